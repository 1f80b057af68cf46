// Rows of field elements, as int8 digits, times a matrix of int8, modulo p = 2^bits - c. WGSL has no
// 64-bit integers; nothing here needs more than 32 bits.
//
// A workgroup makes one output of up to ROWS rows: its invocations divide the columns, four to a word, and each word of
// weights is read once for all digits of all those rows. Sums of products of digits are exact in i32 for every
// width that a field takes.

const LANES: u32 = 64u;
const ROWS: u32 = 4u;
const DIGITS: u32 = 4u;
const SUMS: u32 = 16u;

struct Parameters {
    // Words of a row of weights, and of a row of digits.
    words: u32,
    // Rows of the matrix.
    outputs: u32,
    // Rows of elements.
    rows: u32,
    // Outputs that one step in y skips.
    stride: u32,
    p: u32,
    bits: u32,
    c: u32,
    zero: u32,
}

@group(0) @binding(0) var<uniform> parameters: Parameters;
// outputs x words
@group(0) @binding(1) var<storage, read> weights: array<u32>;
// rows x DIGITS x words
@group(0) @binding(2) var<storage, read> digits: array<u32>;
// rows x outputs
@group(0) @binding(3) var<storage, read_write> product: array<u32>;

var<workgroup> partial: array<i32, 1024>;

// x modulo p, for x < 2p: a difference below zero wraps to more than x.
fn once(x: u32) -> u32 {
    return min(x, x - parameters.p);
}

// 255 x modulo p. 256 x is its upper 8 of `bits` bits times 2^bits, which is c, and the rest.
fn times_255(x: u32) -> u32 {
    let low_bits = parameters.bits - 8u;
    let low = (x & ((1u << low_bits) - 1u)) << 8u;
    let times_256 = once(low + parameters.c * (x >> low_bits));
    let difference = times_256 - x;
    return min(difference, difference + parameters.p);
}

// Of a sum above -p and below p.
fn element(sum: i32) -> u32 {
    let x = bitcast<u32>(sum);
    return min(x, x + parameters.p);
}

@compute @workgroup_size(64)
fn multiply(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let output = group.x + group.y * parameters.stride;
    if (output >= parameters.outputs) {
        return;
    }
    let first = group.z * ROWS;
    let rows = min(ROWS, parameters.rows - first);
    let words = parameters.words;
    var sums: array<i32, 16>;
    for (var word = lane; word < words; word += LANES) {
        let w = weights[output * words + word];
        for (var i = 0u; i < rows * DIGITS; i++) {
            sums[i] += dot4I8Packed(w, digits[(first * DIGITS + i) * words + word]);
        }
    }
    for (var i = 0u; i < SUMS; i++) {
        partial[i * LANES + lane] = sums[i];
    }
    workgroupBarrier();
    if (lane < rows) {
        var y = 0u;
        for (var digit = DIGITS; digit > 0u; digit--) {
            let from_lane = (lane * DIGITS + digit - 1u) * LANES;
            var sum = 0;
            for (var i = 0u; i < LANES; i++) {
                sum += partial[from_lane + i];
            }
            let z = element(sum);
            y = once(times_255(y) + z);
        }
        product[(first + lane) * parameters.outputs + output] = y;
    }
}
