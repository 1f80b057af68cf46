// Runs PTX on a processor, one block after the other: the integer instructions that the kernels of ../kernels come to, as the
// PTX ISA 8.0 defines them. An instruction, a modifier or a type that is not known here is a fault when a module is loaded.
//
// A thread runs until it has to wait for others. What the machine may do in any order is done in an order that a test
// chooses, so that a kernel which relies on luck fails in one of them:
//
//   order    forward, backward: whose turn is next among the threads of a block
//   copies   early: asynchronous copies happen at once; late: when their thread waits for them
//
// Global and shared memory are checked at each access. Timing, caches, coalescing and banks are not emulated.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace ptx {

constexpr unsigned WARP = 32;

struct Dim {
    unsigned x, y, z;
};

struct Orders {
    bool backward = false;
    bool late = false;
};

[[noreturn]] inline void fault(const std::string &what) {
    std::fprintf(stderr, "emulated GPU: %s\n", what.c_str());
    std::abort();
}

inline void expect(bool holds, const std::string &otherwise) {
    if (!holds) {
        fault(otherwise);
    }
}

// Makes no string where it is called for each access.
inline void expect(bool holds, const char *otherwise) {
    if (!holds) {
        fault(otherwise);
    }
}

struct Copy {
    uint8_t *to;
    const uint8_t *from;
    size_t bytes, there;

    void perform() const {
        std::memcpy(to, from, there);
        std::memset(to + there, 0, bytes - there);
    }
};

enum class State { Running, AtBarrier, WithWarp, Ended };

struct Block;

struct Thread {
    State state = State::Running;
    size_t at = 0;
    std::vector<uint64_t> registers;
    unsigned index = 0;
    Block *block = nullptr;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Block {
    Dim index, size;
    std::vector<Thread> threads;
    std::vector<uint8_t> shared;
    std::vector<uint64_t> parameters;
    Orders orders;
    // Whether so many bytes are device memory.
    std::function<bool(const void *, size_t)> global;
};

// Executes one instruction of a thread whose `at` is already the next.
using Step = std::function<void(Thread &)>;
// Executes one instruction of a whole warp.
using Together = std::function<void(Thread *)>;

struct Instruction {
    Step step;
    Together together;
};

struct Type {
    bool is_signed = false;
    unsigned bits = 0;

    uint64_t mask() const {
        return bits == 64 ? ~0ull : (1ull << bits) - 1;
    }
    // Extended to 64 bits as its sign demands.
    uint64_t extend(uint64_t x) const {
        x &= mask();
        return is_signed && bits < 64 && (x >> (bits - 1)) ? x | ~mask() : x;
    }
    Type twice() const {
        return {is_signed, 2 * bits};
    }
    bool less(uint64_t a, uint64_t b) const {
        return is_signed ? static_cast<int64_t>(a) < static_cast<int64_t>(b) : a < b;
    }
};

struct Operand {
    enum { Register, Number, Special, Negated } kind = Number;
    uint64_t value = 0;

    uint64_t get(const Thread &thread) const {
        switch (kind) {
            case Register:
                return thread.registers[value];
            case Negated:
                return thread.registers[value] ^ 1;
            case Number:
                return value;
            default:
                break;
        }
        const unsigned all[] = {thread.index, 0, 0, thread.block->size.x, thread.block->size.y, thread.block->size.z,
                                thread.block->index.x, thread.block->index.y, thread.block->index.z};
        return all[value];
    }
};

inline int byte_of(uint64_t word, unsigned i) {
    return static_cast<int8_t>(word >> (8 * i));
}

inline uint64_t dot(uint64_t a, uint64_t b, uint64_t sum) {
    for (unsigned i = 0; i < 4; i++) {
        sum += static_cast<int64_t>(byte_of(a, i) * byte_of(b, i));
    }
    return static_cast<uint32_t>(sum);
}

class Entry {
  public:
    // Bits of each.
    std::vector<unsigned> parameters;

    void run(Dim grid, Block block) const {
        const unsigned count = block.size.x;
        expect(block.size.y == 1 && block.size.z == 1 && count > 0 && count % WARP == 0 && count <= limit,
               "a block is whole warps in one direction, no more than the kernel is made for");
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                block.index = {x, y, 0};
                // Nobody may rely on what was there.
                block.shared.assign(shared_bytes, 0xa5);
                block.threads.assign(count, Thread{});
                for (unsigned i = 0; i < count; i++) {
                    block.threads[i].registers.assign(register_count, 0xa5a5a5a5a5a5a5a5);
                    block.threads[i].index = i;
                    block.threads[i].block = &block;
                }
                run(block);
            }
        }
    }

    // `text` is what stands between the name and the end of the body; `shared` are declarations of shared memory outside of
    // kernels, of which a kernel has those that it names.
    Entry(const std::string &name, const std::string &text, const std::vector<std::string> &shared) : name(name) {
        for (const std::string &statement : shared) {
            if (text.find(shared_name(statement)) != std::string::npos) {
                declare(statement);
            }
        }
        const size_t body = text.find('{');
        std::istringstream head(text.substr(0, body));
        std::string line;
        while (std::getline(head, line)) {
            if (line.find(".param") != std::string::npos) {
                const size_t last = line.find_last_not_of(" ,\t\r");
                const size_t begin = line.find_last_of(" \t", last);
                parameter_names[line.substr(begin + 1, last - begin)] = parameters.size();
                const bool wide = line.find(".u64") != std::string::npos;
                expect(wide || line.find(".u32") != std::string::npos, name + ": a parameter of another type");
                parameters.push_back(wide ? 64 : 32);
            } else if (const size_t found = line.find(".maxntid"); found != std::string::npos) {
                limit = std::strtoul(line.c_str() + found + 8, nullptr, 10);
            }
        }
        statements(text.substr(body + 1));
    }

  private:
    std::string name;
    std::map<std::string, uint64_t> symbols;
    size_t shared_bytes = 0;
    unsigned limit = 1024;
    std::map<std::string, unsigned> parameter_names;
    std::map<std::string, unsigned> register_names;
    unsigned register_count = 0;
    std::map<std::string, size_t> labels;
    std::vector<Instruction> code;

    // ---- running ----

    void run(Block &block) const {
        const unsigned count = block.threads.size();
        for (;;) {
            for (unsigned i = 0; i < count; i++) {
                Thread &thread = block.threads[block.orders.backward ? count - 1 - i : i];
                while (thread.state == State::Running) {
                    const Instruction &next = code[thread.at++];
                    if (next.together) {
                        thread.state = State::WithWarp;
                    } else {
                        next.step(thread);
                    }
                }
            }
            bool moved = false;
            unsigned waiting = 0, ended = 0;
            for (unsigned i = 0; i < count; i += WARP) {
                moved |= warp(&block.threads[i]);
            }
            for (const Thread &thread : block.threads) {
                waiting += thread.state == State::AtBarrier;
                ended += thread.state == State::Ended;
            }
            if (ended == count) {
                return;
            }
            if (!moved) {
                expect(waiting + ended == count, name + ": threads wait for each other for ever");
                for (Thread &thread : block.threads) {
                    if (thread.state == State::AtBarrier) {
                        thread.state = State::Running;
                    }
                }
            }
        }
    }

    // Executes what a whole warp has come to; false if it has not.
    bool warp(Thread *lanes) const {
        for (unsigned i = 0; i < WARP; i++) {
            if (lanes[i].state != State::WithWarp || lanes[i].at != lanes[0].at) {
                return false;
            }
        }
        code[lanes[0].at - 1].together(lanes);
        for (unsigned i = 0; i < WARP; i++) {
            lanes[i].state = State::Running;
        }
        return true;
    }

    // ---- reading ----

    static std::string trimmed(const std::string &text) {
        const size_t begin = text.find_first_not_of(" \t\r\n");
        const size_t end = text.find_last_not_of(" \t\r\n");
        return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
    }

    static std::vector<std::string> divided(const std::string &text, char at) {
        std::vector<std::string> parts(1);
        int depth = 0;
        for (const char c : text) {
            depth += (c == '{' || c == '[') - (c == '}' || c == ']');
            if (c == at && depth == 0) {
                parts.emplace_back();
            } else {
                parts.back() += c;
            }
        }
        for (std::string &part : parts) {
            part = trimmed(part);
        }
        return parts;
    }

    // Twice, since code jumps forward.
    void statements(const std::string &body) {
        for (const bool labelling : {true, false}) {
            size_t count = 0;
            std::string statement;
            for (const char c : body) {
                if (c == ':') {
                    labels[trimmed(statement)] = count;
                    statement.clear();
                } else if (c == ';') {
                    statement = trimmed(statement);
                    if (statement[0] == '.') {
                        if (labelling) {
                            declare(statement);
                        }
                    } else {
                        if (!labelling) {
                            instruction(statement);
                        }
                        count++;
                    }
                    statement.clear();
                } else if ((c == '{' || c == '}') && trimmed(statement).empty()) {
                    // A scope; names in it are used once.
                } else {
                    statement += c;
                }
            }
        }
    }

    void declare(const std::string &statement) {
        std::istringstream words(statement);
        std::string kind, type, names;
        words >> kind;
        if (kind == ".pragma") {
            return;
        }
        if (kind == ".shared") {
            const size_t bracket = statement.find('[');
            expect(statement.find(".b8") != std::string::npos, "`" + statement + "` is not known");
            shared_bytes = (shared_bytes + 15) / 16 * 16;
            symbols[shared_name(statement)] = shared_bytes;
            shared_bytes += std::strtoul(statement.c_str() + bracket + 1, nullptr, 10);
            return;
        }
        expect(kind == ".reg", name + ": `" + statement + "` is not known");
        words >> type;
        std::getline(words, names);
        for (const std::string &one : divided(names, ',')) {
            const size_t many = one.find('<');
            if (many == std::string::npos) {
                register_names[one] = register_count++;
                continue;
            }
            const unsigned count = std::strtoul(one.c_str() + many + 1, nullptr, 10);
            for (unsigned i = 0; i < count; i++) {
                register_names[one.substr(0, many) + std::to_string(i)] = register_count++;
            }
        }
    }

    // Of `.shared .align 16 .b8 name[bytes]`.
    static std::string shared_name(const std::string &statement) {
        const size_t bracket = statement.find('[');
        expect(bracket != std::string::npos, "`" + statement + "` is not known");
        const size_t begin = statement.find_last_of(" \t", bracket);
        return statement.substr(begin + 1, bracket - begin - 1);
    }

    Operand operand(const std::string &text) const {
        static const std::map<std::string, uint64_t> special = {
            {"%tid.x", 0},  {"%tid.y", 1},   {"%tid.z", 2},   {"%ntid.x", 3},  {"%ntid.y", 4},
            {"%ntid.z", 5}, {"%ctaid.x", 6}, {"%ctaid.y", 7}, {"%ctaid.z", 8},
        };
        Operand operand;
        const bool negated = text[0] == '!';
        if (const auto found = register_names.find(negated ? text.substr(1) : text); found != register_names.end()) {
            operand.kind = negated ? Operand::Negated : Operand::Register;
            operand.value = found->second;
        } else if (const auto found = special.find(text); found != special.end()) {
            operand.kind = Operand::Special;
            operand.value = found->second;
        } else if (const auto found = symbols.find(text); found != symbols.end()) {
            operand.value = found->second;
        } else {
            char *end;
            operand.value = std::strtoll(text.c_str(), &end, 0);
            expect(end != text.c_str() && *end == 0, name + ": operand `" + text + "` is not known");
        }
        return operand;
    }

    unsigned target(const std::string &text) const {
        const Operand found = operand(text);
        expect(found.kind == Operand::Register, name + ": `" + text + "` is no register");
        return found.value;
    }

    // `{a, b}` or `a`
    std::vector<std::string> listed(const std::string &text) const {
        return text[0] == '{' ? divided(text.substr(1, text.size() - 2), ',') : std::vector<std::string>{text};
    }

    struct Address {
        Operand base;
        uint64_t offset = 0;

        uint64_t get(const Thread &thread) const {
            return base.get(thread) + offset;
        }
    };

    Address address(const std::string &text) const {
        expect(text.size() > 2 && text[0] == '[', name + ": `" + text + "` is no address");
        const std::string inside = text.substr(1, text.size() - 2);
        const size_t sum = inside.find('+');
        Address address;
        address.base = operand(trimmed(inside.substr(0, sum)));
        if (sum != std::string::npos) {
            address.offset = std::strtoll(inside.c_str() + sum + 1, nullptr, 0);
        }
        return address;
    }

    static uint8_t *shared_at(Thread &thread, uint64_t address, size_t bytes) {
        address = static_cast<uint32_t>(address);
        auto &shared = thread.block->shared;
        expect(address + bytes <= shared.size() && address % bytes == 0, "an access outside of shared memory");
        return shared.data() + address;
    }

    static uint8_t *global_at(Thread &thread, uint64_t address, size_t bytes) {
        auto *at = reinterpret_cast<uint8_t *>(address);
        expect(address % bytes == 0 && thread.block->global(at, bytes), "an access outside of device memory");
        return at;
    }

    void instruction(std::string statement) {
        Operand guard;
        guard.value = 1;
        if (statement[0] == '@') {
            const size_t end = statement.find_first_of(" \t");
            guard = operand(statement.substr(1, end - 1));
            statement = trimmed(statement.substr(end));
        }
        const size_t end = statement.find_first_of(" \t\n");
        const std::string opcode = statement.substr(0, end);
        std::vector<std::string> operands;
        if (end != std::string::npos) {
            operands = divided(statement.substr(end), ',');
        }
        const std::vector<std::string> parts = divided(opcode, '.');
        Instruction made = translated(opcode, parts, operands);
        expect(made.step || made.together, name + ": instruction `" + statement + "` is not known");
        if (guard.kind != Operand::Number) {
            expect(!made.together, name + ": `" + statement + "` has a guard");
            const Step step = made.step;
            made.step = [guard, step](Thread &thread) {
                if (guard.get(thread) & 1) {
                    step(thread);
                }
            };
        }
        code.push_back(made);
    }

    static bool typed(const std::string &text, Type &type) {
        if (text == "pred") {
            type = {false, 1};
            return true;
        }
        const bool known = text == "u8" || text == "b8" || text == "s8" || text == "u16" || text == "b16" ||
                           text == "s16" || text == "u32" || text == "b32" || text == "s32" || text == "u64" ||
                           text == "b64" || text == "s64";
        if (known) {
            type = {text[0] == 's', static_cast<unsigned>(std::strtoul(text.c_str() + 1, nullptr, 10))};
        }
        return known;
    }

    using Binary = uint64_t (*)(Type, uint64_t, uint64_t);

    // a op b in 64 bits, cut off afterwards.
    static Binary binary(const std::string &base, const std::string &mode) {
        static const std::map<std::string, Binary> known = {
            {"add", [](Type, uint64_t a, uint64_t b) { return a + b; }},
            {"sub", [](Type, uint64_t a, uint64_t b) { return a - b; }},
            {"mul.lo", [](Type, uint64_t a, uint64_t b) { return a * b; }},
            {"mul.wide", [](Type, uint64_t a, uint64_t b) { return a * b; }},
            {"mul.hi", [](Type type, uint64_t a, uint64_t b) -> uint64_t {
                 if (type.bits == 32) {
                     return (a * b) >> 32;
                 }
                 using Wide = __int128;
                 const Wide wide_a = type.is_signed ? Wide(int64_t(a)) : Wide(a);
                 const Wide wide_b = type.is_signed ? Wide(int64_t(b)) : Wide(b);
                 return static_cast<uint64_t>((wide_a * wide_b) >> 64);
             }},
            {"and", [](Type, uint64_t a, uint64_t b) { return a & b; }},
            {"or", [](Type, uint64_t a, uint64_t b) { return a | b; }},
            {"xor", [](Type, uint64_t a, uint64_t b) { return a ^ b; }},
            {"min", [](Type type, uint64_t a, uint64_t b) { return type.less(a, b) ? a : b; }},
            {"max", [](Type type, uint64_t a, uint64_t b) { return type.less(a, b) ? b : a; }},
            {"div", [](Type type, uint64_t a, uint64_t b) {
                 expect(b != 0, "a division by zero");
                 return type.is_signed ? static_cast<uint64_t>(int64_t(a) / int64_t(b)) : a / b;
             }},
            {"rem", [](Type type, uint64_t a, uint64_t b) {
                 expect(b != 0, "a division by zero");
                 return type.is_signed ? static_cast<uint64_t>(int64_t(a) % int64_t(b)) : a % b;
             }},
        };
        const auto found = known.find(mode.empty() ? base : base + "." + mode);
        return found == known.end() ? nullptr : found->second;
    }

    static uint64_t shifted(bool left, Type type, uint64_t a, uint64_t by) {
        by = static_cast<uint32_t>(by);
        if (left) {
            return by >= type.bits ? 0 : a << by;
        }
        if (by >= type.bits) {
            return type.is_signed && int64_t(a) < 0 ? ~0ull : 0;
        }
        return type.is_signed ? static_cast<uint64_t>(int64_t(a) >> by) : a >> by;
    }

    static bool compared(const std::string &how, Type type, uint64_t a, uint64_t b) {
        if (how == "eq" || how == "ne") {
            return (a == b) == (how == "eq");
        }
        if (how == "lt" || how == "lo") {
            return type.less(a, b);
        }
        if (how == "gt" || how == "hi") {
            return type.less(b, a);
        }
        if (how == "le" || how == "ls") {
            return !type.less(b, a);
        }
        expect(how == "ge" || how == "hs", "comparison `" + how + "` is not known");
        return !type.less(a, b);
    }

    // Nothing if it is not known.
    Instruction translated(const std::string &opcode, const std::vector<std::string> &parts,
                           const std::vector<std::string> &operands) const {
        const std::string &base = parts[0];
        Type type;
        const bool has_type = typed(parts.back(), type);
        const auto is = [&](const char *other) { return opcode == other; };
        const auto get = [&](size_t i) { return operand(operands.at(i)); };
        if (is("ret")) {
            return {[](Thread &thread) { thread.state = State::Ended; }, {}};
        }
        if (base == "bra") {
            const auto found = labels.find(operands.at(0));
            expect(found != labels.end(), name + ": no label " + operands.at(0));
            const size_t to = found->second;
            return {[to](Thread &thread) { thread.at = to; }, {}};
        }
        if (is("bar.sync") || is("barrier.sync")) {
            expect(operands.at(0) == "0", name + ": only barrier 0");
            return {[](Thread &thread) { thread.state = State::AtBarrier; }, {}};
        }
        if (base == "ld" || base == "st") {
            return has_type ? access(base == "ld", parts, type, operands) : Instruction{};
        }
        if (base == "cp") {
            return asynchronous(opcode, operands);
        }
        if (is("redux.sync.add.s32")) {
            const unsigned to = target(operands.at(0));
            const Operand from = get(1), mask = get(2);
            return {{}, [=](Thread *lanes) {
                        uint64_t sum = 0;
                        for (unsigned i = 0; i < WARP; i++) {
                            expect(static_cast<uint32_t>(mask.get(lanes[i])) == ~0u, "only whole warps add up");
                            sum += from.get(lanes[i]);
                        }
                        for (unsigned i = 0; i < WARP; i++) {
                            lanes[i].registers[to] = static_cast<uint32_t>(sum);
                        }
                    }};
        }
        if (is("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")) {
            return multiply(operands);
        }
        if (!has_type) {
            return {};
        }
        if (is("dp4a.s32.s32")) {
            const unsigned to = target(operands.at(0));
            const Operand a = get(1), b = get(2), sum = get(3);
            return {[=](Thread &t) { t.registers[to] = dot(a.get(t), b.get(t), sum.get(t)); }, {}};
        }
        if (base == "mov" && (operands.at(0)[0] == '{' || operands.at(1)[0] == '{')) {
            return packed(type, operands);
        }
        const unsigned to = target(divided(operands.at(0), '|')[0]);
        const auto store = [to](Thread &thread, Type type, uint64_t value) { thread.registers[to] = value & type.mask(); };
        if (base == "mov" || base == "neg" || base == "not" || base == "cvta" || base == "cvt") {
            Type from = type, into = type;
            if (base == "cvt") {
                expect(parts.size() == 3 && typed(parts[1], into), name + ": `" + opcode + "` is not known");
            } else if (base == "cvta") {
                // Global and generic addresses are the same; shared ones are never generic in our kernels.
                expect(is("cvta.to.global.u64"), name + ": `" + opcode + "` is not known");
            } else {
                expect(parts.size() == 2, name + ": `" + opcode + "` is not known");
            }
            const Operand a = get(1);
            const bool negative = base == "neg", inverted = base == "not";
            return {[=](Thread &t) {
                        const uint64_t x = from.extend(a.get(t));
                        store(t, into, negative ? -x : inverted ? ~x : x);
                    },
                    {}};
        }
        if (base == "shl" || base == "shr") {
            const Operand a = get(1), by = get(2);
            const bool left = base == "shl";
            return {[=](Thread &t) { store(t, type, shifted(left, type, type.extend(a.get(t)), by.get(t))); }, {}};
        }
        if (is("bfi.b32")) {
            const Operand what = get(1), into = get(2), at = get(3), length = get(4);
            return {[=](Thread &t) {
                        const uint64_t first = at.get(t) & 255, bits = length.get(t) & 255;
                        const uint64_t mask = (bits > 31 ? ~0ull : (1ull << bits) - 1) << (first > 32 ? 32 : first);
                        const uint64_t placed = (what.get(t) << (first > 32 ? 32 : first)) & mask;
                        store(t, type, (into.get(t) & ~mask) | placed);
                    },
                    {}};
        }
        if (base == "selp") {
            const Operand a = get(1), b = get(2), which = get(3);
            return {[=](Thread &t) { store(t, type, which.get(t) & 1 ? a.get(t) : b.get(t)); }, {}};
        }
        if (base == "setp") {
            const Operand a = get(1), b = get(2);
            const std::string how = parts[1], with = parts.size() == 4 ? parts[2] : "";
            expect(parts.size() == 3 || with == "and" || with == "or", name + ": `" + opcode + "` is not known");
            const Operand other = with.empty() ? Operand{} : get(3);
            return {[=](Thread &t) {
                        bool holds = compared(how, type, type.extend(a.get(t)), type.extend(b.get(t)));
                        if (!with.empty()) {
                            const bool also = other.get(t) & 1;
                            holds = with == "and" ? holds && also : holds || also;
                        }
                        t.registers[to] = holds;
                    },
                    {}};
        }
        if (base == "mad" && parts.size() == 3) {
            const Binary product = binary("mul", parts[1]);
            const Operand a = get(1), b = get(2), c = get(3);
            const Type into = parts[1] == "wide" ? type.twice() : type;
            if (!product) {
                return {};
            }
            return {[=](Thread &t) {
                        const uint64_t x = product(type, type.extend(a.get(t)), type.extend(b.get(t)));
                        store(t, into, x + c.get(t));
                    },
                    {}};
        }
        const Binary operation = binary(base, parts.size() == 3 ? parts[1] : "");
        if (!operation || parts.size() > 3) {
            return {};
        }
        const Operand a = get(1), b = get(2);
        const Type into = parts[1] == "wide" ? type.twice() : type;
        return {[=](Thread &t) { store(t, into, operation(type, type.extend(a.get(t)), type.extend(b.get(t)))); }, {}};
    }

    // `mov.b64 {low, high}, x` and `mov.b64 x, {low, high}`
    Instruction packed(Type type, const std::vector<std::string> &operands) const {
        const std::vector<std::string> into = listed(operands.at(0)), from = listed(operands.at(1));
        if (type.bits != 64 || into.size() + from.size() != 3) {
            return {};
        }
        if (into.size() == 2) {
            const unsigned low = target(into[0]), high = target(into[1]);
            const Operand x = operand(from[0]);
            return {[=](Thread &t) {
                        const uint64_t whole = x.get(t);
                        t.registers[low] = static_cast<uint32_t>(whole);
                        t.registers[high] = whole >> 32;
                    },
                    {}};
        }
        const unsigned to = target(into[0]);
        const Operand low = operand(from[0]), high = operand(from[1]);
        return {[=](Thread &t) { t.registers[to] = static_cast<uint32_t>(low.get(t)) | high.get(t) << 32; }, {}};
    }

    // Loads and stores; hints about caches change nothing.
    Instruction access(bool load, const std::vector<std::string> &parts, Type type,
                       const std::vector<std::string> &operands) const {
        const std::string &space = parts[1];
        size_t values = 1;
        for (size_t i = 2; i + 1 < parts.size(); i++) {
            if (parts[i] == "v2" || parts[i] == "v4") {
                values = parts[i][1] - '0';
            } else if (parts[i] != "nc" && parts[i] != "cs" && parts[i] != "ca" && parts[i] != "cg") {
                return {};
            }
        }
        const std::vector<std::string> names = listed(operands.at(load ? 0 : 1));
        const std::string &where = operands.at(load ? 1 : 0);
        if (names.size() != values) {
            return {};
        }
        if (space == "param") {
            const auto found = parameter_names.find(where.substr(1, where.size() - 2));
            expect(load && values == 1 && found != parameter_names.end(), name + ": parameter " + where);
            const unsigned which = found->second, to = target(names[0]);
            return {[=](Thread &t) { t.registers[to] = t.block->parameters[which] & type.mask(); }, {}};
        }
        if (space != "global" && space != "shared") {
            return {};
        }
        const bool global = space == "global";
        const Address at = address(where);
        const size_t bytes = type.bits / 8;
        std::vector<Operand> all;
        for (const std::string &one : names) {
            all.push_back(operand(one));
            expect(!load || all.back().kind == Operand::Register, name + ": a load into `" + one + "`");
        }
        return {[=](Thread &t) {
                    uint8_t *memory = (global ? global_at : shared_at)(t, at.get(t), bytes * all.size());
                    for (const Operand &one : all) {
                        uint64_t value = 0;
                        if (load) {
                            std::memcpy(&value, memory, bytes);
                            t.registers[one.value] = type.extend(value) & (type.bits == 64 ? ~0ull : 0xffffffff);
                        } else {
                            value = one.get(t);
                            std::memcpy(memory, &value, bytes);
                        }
                        memory += bytes;
                    }
                },
                {}};
    }

    Instruction asynchronous(const std::string &opcode, const std::vector<std::string> &operands) const {
        if (opcode == "cp.async.commit_group") {
            return {[](Thread &t) {
                        t.groups.push_back(std::move(t.open));
                        t.open.clear();
                    },
                    {}};
        }
        if (opcode == "cp.async.wait_group") {
            const size_t left = operand(operands.at(0)).value;
            return {[left](Thread &t) {
                        while (t.groups.size() > left) {
                            for (const Copy &copy : t.groups.front()) {
                                copy.perform();
                            }
                            t.groups.erase(t.groups.begin());
                        }
                    },
                    {}};
        }
        if (opcode != "cp.async.cg.shared.global" || operands.size() != 4 || operands[2] != "16") {
            return {};
        }
        const Address to = address(operands[0]), from = address(operands[1]);
        const Operand there = operand(operands[3]);
        return {[=](Thread &t) {
                    const size_t bytes = static_cast<uint32_t>(there.get(t));
                    expect(bytes == 0 || bytes == 16, "a copy of another size");
                    const uint8_t *source = bytes == 0 ? nullptr : global_at(t, from.get(t), 16);
                    const Copy copy{shared_at(t, to.get(t), 16), source, 16, bytes};
                    if (t.block->orders.late) {
                        t.open.push_back(copy);
                    } else {
                        copy.perform();
                    }
                },
                {}};
    }

    // d = a b + c. Element (row, k) of a is byte k % 4 of register row / 8 + 2 (k / 16) in lane 4 (row % 8) + k % 16 / 4;
    // (k, column) of b is byte k % 4 of register k / 16 in lane 4 column + k % 16 / 4; and (row, column) of c and d is
    // register column % 2 + 2 (row / 8) in lane 4 (row % 8) + column / 2.
    Instruction multiply(const std::vector<std::string> &operands) const {
        if (operands.size() != 4) {
            return {};
        }
        std::vector<Operand> of[4];
        for (size_t i = 0; i < 4; i++) {
            for (const std::string &one : listed(operands[i])) {
                of[i].push_back(operand(one));
            }
        }
        const std::vector<Operand> d = of[0], a = of[1], b = of[2], c = of[3];
        expect(d.size() == 4 && a.size() == 4 && b.size() == 2 && c.size() == 4, name + ": fragments of mma");
        return {{}, [d, a, b, c](Thread *lanes) {
                    int of_a[16][32], of_b[8][32];
                    for (unsigned k = 0; k < 32; k++) {
                        for (unsigned row = 0; row < 16; row++) {
                            const Thread &lane = lanes[4 * (row % 8) + k % 16 / 4];
                            of_a[row][k] = byte_of(a[row / 8 + 2 * (k / 16)].get(lane), k % 4);
                        }
                        for (unsigned column = 0; column < 8; column++) {
                            const Thread &lane = lanes[4 * column + k % 16 / 4];
                            of_b[column][k] = byte_of(b[k / 16].get(lane), k % 4);
                        }
                    }
                    for (unsigned row = 0; row < 16; row++) {
                        for (unsigned column = 0; column < 8; column++) {
                            Thread &lane = lanes[4 * (row % 8) + column / 2];
                            const unsigned which = column % 2 + 2 * (row / 8);
                            int sum = 0;
                            for (unsigned k = 0; k < 32; k++) {
                                sum += of_a[row][k] * of_b[column][k];
                            }
                            const uint64_t all = c[which].get(lane) + static_cast<int64_t>(sum);
                            lane.registers[d[which].value] = static_cast<uint32_t>(all);
                        }
                    }
                }};
    }
};

struct Module {
    std::map<std::string, Entry> entries;

    explicit Module(const std::string &image) {
        std::string text;
        std::istringstream lines(image);
        std::string line;
        while (std::getline(lines, line)) {
            text += line.substr(0, line.find("//")) + "\n";
        }
        // What stands outside of kernels, and the kernels.
        std::string outside;
        std::map<std::string, std::string> kernels;
        const std::string visible = ".visible .entry ";
        size_t at = 0;
        for (size_t next; (next = text.find(visible, at)) != std::string::npos;) {
            outside += text.substr(at, next - at);
            const size_t open = text.find('(', next);
            at = text.find('{', open) + 1;
            for (int depth = 1; depth > 0; at++) {
                expect(at < text.size(), "PTX ends within a kernel");
                depth += (text[at] == '{') - (text[at] == '}');
            }
            const size_t name = next + visible.size();
            kernels[text.substr(name, open - name)] = text.substr(open + 1, at - open - 2);
        }
        outside += text.substr(at);
        expect(outside.find(".target sm_80") != std::string::npos, "PTX of another target");
        std::vector<std::string> shared;
        for (size_t begin = 0; (begin = outside.find(".shared", begin)) != std::string::npos; begin++) {
            shared.push_back(outside.substr(begin, outside.find(';', begin) - begin));
        }
        for (const auto &[name, body] : kernels) {
            entries.emplace(name, Entry(name, body, shared));
        }
    }
};

}  // namespace ptx
