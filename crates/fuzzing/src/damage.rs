//! Inputs that say how to damage an honest sample. Samples that are encrypted, signed or fresh in each process cannot be
//! seeds themselves; and where random bytes would fail at the first signature, damage goes as deep as there is to go.

/// Applies the edits in `program` to `bytes`: each is an operation (1 byte), a position (2 bytes, taken modulo the
/// length) and a value.
pub(crate) fn apply(program: &[u8], bytes: &mut Vec<u8>) {
    for edit in program.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([edit[1], edit[2]]));
        let (at, value) = (at % bytes.len().max(1), edit[3]);
        match edit[0] % 8 {
            0 | 1 => bytes.iter_mut().skip(at).take(1).for_each(|b| *b ^= value),
            2 => bytes.iter_mut().skip(at).take(1).for_each(|b| *b = value),
            3 => bytes.insert(at.min(bytes.len()), value),
            4 => {
                let end = (at + usize::from(value)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            5 => bytes.truncate(bytes.len().saturating_sub(usize::from(value))),
            6 => {
                let end = (at + usize::from(value)).min(bytes.len());
                let again = bytes[at.min(end)..end].to_vec();
                bytes.splice(at..at, again);
            }
            _ => bytes.extend(std::iter::repeat_n(value, at % 64)),
        }
    }
}

/// Programs worth starting from: no damage, and one edit of each kind near front, middle and end.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![Vec::new()];
    for operation in 0..8 {
        for at in [0u16, 40, 700, 5000] {
            let [low, high] = at.to_le_bytes();
            seeds.push(vec![operation, low, high, 1]);
        }
    }
    seeds
}

/// The same behind a first byte that chooses among `parts`.
pub(crate) fn seeds_of_parts(parts: u8) -> Vec<Vec<u8>> {
    let each = |part| {
        seeds()
            .into_iter()
            .map(move |seed| [&[part], &seed[..]].concat())
    };
    (0..parts).flat_map(each).collect()
}
