// Products y = x W^T modulo p = 2^bits - c on a GPU: x are rows of elements, W is a matrix of int8.
//
//   split                 elements -> rows of digits
//   few_1, few_2, few_4   a warp makes a few outputs of all rows: reads weights once, coalesced, and waits for memory
//   narrow, wide          blocks make tiles on tensor cores; narrow reads weights once for up to 16 rows
//
// `product.ptx` is made of this file by tools/cuda/ptx.py. ../src/plan.rs has the sizes of tiles, once more, for whoever
// launches. Tests run the PTX with ../emulator.

typedef signed char i8;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

// Balanced digits in base 255, -127..=127; sums of their products with int8 are exact in an int for every width that a
// field takes.
constexpr u32 DIGITS = 4;

// 127 * (1 + 255 + 255^2 + 255^3): added to a centred residue it makes the digits 0..=254.
constexpr u32 SHIFT = 127u * (1 + 255 + 255 * 255 + 255 * 255 * 255);

// Four rows of elements are sixteen rows of digits, ordered so that a thread which holds columns 2i and 2i + 1 of
// two neighbouring tiles of `mma`'s results has all digits of row i:
//
//   first eight    row 0: digits 0, 1 | row 1: 0, 1 | row 2: 0, 1 | row 3: 0, 1
//   second eight   row 0: digits 2, 3 | row 1: 2, 3 | row 2: 2, 3 | row 3: 2, 3
__device__ inline u32 digit_row(u32 row, u32 digit) {
    return row / 4 * 16 + digit / 2 * 8 + row % 4 * 2 + digit % 2;
}

// A smaller number that is the same modulo p, since 2^bits is c.
__device__ inline u64 fold(u64 x, u32 bits, u32 c) {
    return (x & ((1ull << bits) - 1)) + c * (x >> bits);
}

// The element z0 + 255 z1 + 255^2 z2 + 255^3 z3, as in crates/field/src/digits.rs.
__device__ inline u32 recombine(int z0, int z1, int z2, int z3, u32 bits, u32 c) {
    const u32 p = (1u << bits) - c;
    const i64 sum = z0 + 255ll * z1 + 65025ll * z2 + 16581375ll * z3;
    // Below 2^56 in magnitude, which a multiple of p is added to.
    const u64 x = static_cast<u64>(sum + (static_cast<i64>(p) << 28));
    const u32 y = static_cast<u32>(fold(fold(x, bits, c), bits, c));
    return y < p ? y : y - p;
}

// One thread for four columns of a row; rows are padded to whole groups of four and columns to `width` with zeros.
extern "C" __global__ void split(const u32 *elements, u32 *digits, u32 rows, u32 columns, u32 width, u32 p) {
    const u32 word = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 row = blockIdx.y;
    const u32 words = width / 4;
    if (word >= words) {
        return;
    }
    u32 packed[DIGITS] = {};
    for (u32 i = 0; i < 4; i++) {
        const u32 column = word * 4 + i;
        if (row < rows && column < columns) {
            const u32 x = elements[static_cast<u64>(row) * columns + column];
            u32 rest = x - (x > p / 2 ? p : 0) + SHIFT;
            for (u32 digit = 0; digit < DIGITS; digit++) {
                const u32 quotient = rest / 255;
                packed[digit] |= ((rest - quotient * 255 - 127) & 255) << (8 * i);
                rest = quotient;
            }
        }
    }
    for (u32 digit = 0; digit < DIGITS; digit++) {
        digits[static_cast<u64>(digit_row(row, digit)) * words + word] = packed[digit];
    }
}

// ---- few rows ----

constexpr u32 FEW_THREADS = 128;

// Outputs of a warp: digits are read once for all of them, weights once for all digits.
constexpr u32 FEW_OUTPUTS = 4;

// sum + a b, of four int8 each. The compiler does not know `__dp4a`.
__device__ inline int dp4a(int a, int b, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

__device__ inline int dot(int4 a, int4 b, int sum) {
    sum = dp4a(a.x, b.x, sum);
    sum = dp4a(a.y, b.y, sum);
    sum = dp4a(a.z, b.z, sum);
    return dp4a(a.w, b.w, sum);
}

// Up to ROWS rows. Lanes divide the columns, sixteen at a time.
template <u32 ROWS>
__device__ inline void few(
    const int4 *weights, const int4 *digits, u32 *product, u32 rows, u32 outputs, u32 width, u32 bits, u32 c) {
    const u32 lane = threadIdx.x % 32;
    const u32 warp = blockIdx.x * (FEW_THREADS / 32) + threadIdx.x / 32;
    const u32 first = warp * FEW_OUTPUTS;
    if (first >= outputs) {
        return;
    }
    const u32 chunks = width / 16;
    const int4 *lines[FEW_OUTPUTS];
#pragma unroll
    for (u32 i = 0; i < FEW_OUTPUTS; i++) {
        // Past the last output the last is computed again.
        const u32 output = first + i < outputs ? first + i : outputs - 1;
        lines[i] = weights + static_cast<u64>(output) * chunks;
    }
    int sums[ROWS][DIGITS][FEW_OUTPUTS] = {};
#pragma unroll (4 / ROWS)
    for (u32 chunk = lane; chunk < chunks; chunk += 32) {
        int4 w[FEW_OUTPUTS];
#pragma unroll
        for (u32 i = 0; i < FEW_OUTPUTS; i++) {
            // Read once by nobody else: it need not push digits out of the cache.
            w[i] = __ldcs(lines[i] + chunk);
        }
#pragma unroll
        for (u32 row = 0; row < ROWS; row++) {
#pragma unroll
            for (u32 digit = 0; digit < DIGITS; digit++) {
                const int4 d = digits[static_cast<u64>(digit_row(row, digit)) * chunks + chunk];
#pragma unroll
                for (u32 i = 0; i < FEW_OUTPUTS; i++) {
                    sums[row][digit][i] = dot(w[i], d, sums[row][digit][i]);
                }
            }
        }
    }
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
#pragma unroll
        for (u32 i = 0; i < FEW_OUTPUTS; i++) {
            int z[DIGITS];
#pragma unroll
            for (u32 digit = 0; digit < DIGITS; digit++) {
                z[digit] = __reduce_add_sync(~0u, sums[row][digit][i]);
            }
            if (lane == row * FEW_OUTPUTS + i && row < rows && first + i < outputs) {
                product[static_cast<u64>(row) * outputs + first + i] = recombine(z[0], z[1], z[2], z[3], bits, c);
            }
        }
    }
}

// ---- many rows ----

// Copies sixteen bytes to shared memory, or writes zeros, some time before a later `wait` returns.
__device__ inline void copy(int4 *to, const int4 *from, bool there) {
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    const u64 source = static_cast<u64>(__cvta_generic_to_global(from));
    const u32 bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

// Ends a group of copies.
__device__ inline void commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups but the last N.
template <u32 N>
__device__ inline void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// d += a b by a warp: a is 16 x 32 by rows, b is 32 x 8 by columns.
__device__ inline void mma(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A block makes OUTPUTS outputs of ROWS rows with WARPS_OUT by WARPS_ROWS warps. Weights and digits pass through shared
// memory in pieces of COLUMNS columns, of which STAGES are there or on their way.
template <u32 OUTPUTS, u32 ROWS, u32 COLUMNS, u32 STAGES, u32 WARPS_OUT, u32 WARPS_ROWS>
__device__ inline void many(
    const int4 *weights, const int4 *digits, u32 *product, u32 rows, u32 outputs, u32 width, u32 bits, u32 c) {
    constexpr u32 THREADS = WARPS_OUT * WARPS_ROWS * 32;
    constexpr u32 LINES = OUTPUTS + ROWS * DIGITS;
    constexpr u32 CHUNKS = COLUMNS / 16;
    constexpr u32 WARP_OUTPUTS = OUTPUTS / WARPS_OUT;
    constexpr u32 WARP_DIGITS = ROWS * DIGITS / WARPS_ROWS;
    constexpr u32 M = WARP_OUTPUTS / 16;
    constexpr u32 N = WARP_DIGITS / 8;
    static_assert(OUTPUTS % (16 * WARPS_OUT) == 0 && ROWS * DIGITS % (16 * WARPS_ROWS) == 0, "tiles of mma");
    static_assert(ROWS % 4 == 0 && COLUMNS % 32 == 0 && LINES * CHUNKS % THREADS == 0, "pieces");
    // Lines of weights, then of digits. The sixteen bytes between lines put the eight lines that a warp reads at once
    // into different banks.
    __shared__ int4 tiles[STAGES][LINES][CHUNKS + 1];
    static_assert(sizeof(tiles) <= 48 << 10, "shared memory");

    const u32 row_tiles = (rows + ROWS - 1) / ROWS;
    const u32 first_row = blockIdx.x % row_tiles * ROWS;
    const u32 first_output = blockIdx.x / row_tiles * OUTPUTS;
    const u32 chunks = width / 16;
    const u32 digit_rows = (rows + 3) / 4 * 16;
    const u32 pieces = (chunks + CHUNKS - 1) / CHUNKS;

    const auto fetch = [&](u32 piece) {
        for (u32 i = threadIdx.x; i < LINES * CHUNKS; i += THREADS) {
            const u32 line = i / CHUNKS;
            const u32 chunk = piece * CHUNKS + i % CHUNKS;
            const bool weight = line < OUTPUTS;
            const u32 from = weight ? first_output + line : first_row * DIGITS + line - OUTPUTS;
            const bool there = from < (weight ? outputs : digit_rows) && chunk < chunks;
            const int4 *source = weight ? weights : digits;
            const u64 at = there ? static_cast<u64>(from) * chunks + chunk : 0;
            copy(&tiles[piece % STAGES][line][i % CHUNKS], source + at, there);
        }
    };

    // As `mma` divides its operands among a warp's threads: PTX ISA, "Matrix Fragments for mma.m16n8k32".
    const u32 group = threadIdx.x % 32 / 4;
    const u32 pair = threadIdx.x % 4;
    const u32 warp_output = threadIdx.x / 32 / WARPS_ROWS * WARP_OUTPUTS;
    const u32 warp_digit = threadIdx.x / 32 % WARPS_ROWS * WARP_DIGITS;
    int sums[M][N][4] = {};

    for (u32 piece = 0; piece + 1 < STAGES; piece++) {
        if (piece < pieces) {
            fetch(piece);
        }
        commit();
    }
    for (u32 piece = 0; piece < pieces; piece++) {
        wait<STAGES - 2>();
        // Now everybody's part of this piece is there, and nobody reads the one before any more, whose place is next.
        __syncthreads();
        if (piece + STAGES - 1 < pieces) {
            fetch(piece + STAGES - 1);
        }
        commit();
        const auto word = [&](u32 line, u32 column) {
            return reinterpret_cast<const u32 *>(tiles[piece % STAGES][line])[column / 4 + pair];
        };
#pragma unroll
        for (u32 column = 0; column < COLUMNS; column += 32) {
            u32 a[M][4];
            u32 b[N][2];
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                const u32 line = warp_output + m * 16 + group;
                a[m][0] = word(line, column);
                a[m][1] = word(line + 8, column);
                a[m][2] = word(line, column + 16);
                a[m][3] = word(line + 8, column + 16);
            }
#pragma unroll
            for (u32 n = 0; n < N; n++) {
                const u32 line = OUTPUTS + warp_digit + n * 8 + group;
                b[n][0] = word(line, column);
                b[n][1] = word(line, column + 16);
            }
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 n = 0; n < N; n++) {
                    mma(sums[m][n], a[m], b[n]);
                }
            }
        }
    }
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < N; n += 2) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 output = first_output + warp_output + m * 16 + half * 8 + group;
                const u32 row = first_row + (warp_digit + n * 8) / DIGITS + pair;
                const int *low = sums[m][n] + 2 * half;
                const int *high = sums[m][n + 1] + 2 * half;
                if (output < outputs && row < rows) {
                    product[static_cast<u64>(row) * outputs + output] =
                        recombine(low[0], low[1], high[0], high[1], bits, c);
                }
            }
        }
    }
}

// ---- kernels ----

#define PRODUCT                                                                                                      \
    const int4 *weights, const int4 *digits, u32 *product, u32 rows, u32 outputs, u32 width, u32 bits, u32 c

extern "C" __global__ void __launch_bounds__(FEW_THREADS) few_1(PRODUCT) {
    few<1>(weights, digits, product, rows, outputs, width, bits, c);
}

extern "C" __global__ void __launch_bounds__(FEW_THREADS) few_2(PRODUCT) {
    few<2>(weights, digits, product, rows, outputs, width, bits, c);
}

extern "C" __global__ void __launch_bounds__(FEW_THREADS) few_4(PRODUCT) {
    few<4>(weights, digits, product, rows, outputs, width, bits, c);
}

extern "C" __global__ void __launch_bounds__(128) narrow(PRODUCT) {
    many<32, 16, 128, 3, 2, 2>(weights, digits, product, rows, outputs, width, bits, c);
}

extern "C" __global__ void __launch_bounds__(256, 2) wide(PRODUCT) {
    many<128, 32, 64, 2, 2, 4>(weights, digits, product, rows, outputs, width, bits, c);
}
