//! What a worker sees of products that are handed out to it, as a file, so that attacks on it can be measured.
//!
//! ```text
//! file  = "CMTR" ‖ version u16 = 1 ‖ stack…                                            little-endian throughout
//! stack = field u8 ‖ 0 u8 ‖ length u16 (1..=64) ‖ name, UTF-8 ‖ rows u32 ‖ columns u32 ‖ elements u32, row by row
//! field = 1: F_p with p = 2^29 − 3, at most 16643 columns / 2: p = 2^31 − 1, at most 66572
//! ```
//! Every element is below p. A reader refuses anything else, more than 2^26 elements in a stack, and bytes behind the
//! last stack.

use casemate_field::Field;

/// A file is no transcript, or one that says what cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the transcript is malformed: {0}")]
pub struct Malformed(&'static str);

const MAGIC: &[u8; 6] = b"CMTR\x01\x00";
/// Longest name of a stack, in bytes.
const MAX_NAME: usize = 64;
/// Most elements of a stack.
const MAX_ELEMENTS: u64 = 1 << 26;

/// An element that is uniform if `random` is, by rejection.
fn draw(field: Field, random: &mut impl FnMut() -> u32) -> u32 {
    loop {
        let element = random() & ((1 << field.bits()) - 1);
        if element < field.modulus() {
            return element;
        }
    }
}

/// A row with another pad for each value: x + r mod p.
pub fn mask(field: Field, row: &[i8], random: &mut impl FnMut() -> u32) -> Vec<u32> {
    let pad: Vec<u32> = row.iter().map(|_| draw(field, random)).collect();
    let mut masked = vec![0; row.len()];
    field.mask_row(row, &pad, &mut masked);
    masked
}

/// An element as a number about 0, from -1 to 1.
#[must_use]
pub fn centred(field: Field, element: u32) -> f32 {
    (f64::from(field.centre(element)) / f64::from(field.modulus() / 2)) as f32
}

/// The rows that one stack of matrices got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// At most 64 bytes.
    pub name: String,
    /// What elements are of.
    pub field: Field,
    /// Elements of a row.
    pub columns: usize,
    /// Row by row.
    pub elements: Vec<u32>,
}

impl Stack {
    /// Row by row.
    pub fn rows(&self) -> impl Iterator<Item = &[u32]> {
        self.elements.chunks_exact(self.columns)
    }
}

/// The bytes of a transcript.
///
/// # Panics
/// If a stack has no columns.
#[must_use]
pub fn to_bytes(stacks: &[Stack]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    for stack in stacks {
        let rows = stack.elements.len() / stack.columns;
        out.extend([stack.field.id(), 0]);
        out.extend((stack.name.len() as u16).to_le_bytes());
        out.extend(stack.name.as_bytes());
        out.extend((rows as u32).to_le_bytes());
        out.extend((stack.columns as u32).to_le_bytes());
        out.extend(stack.elements.iter().flat_map(|e| e.to_le_bytes()));
    }
    out
}

/// Reads what [`to_bytes`] wrote.
///
/// # Errors
/// [`Malformed`] for anything else.
pub fn from_bytes(bytes: &[u8]) -> Result<Vec<Stack>, Malformed> {
    let wrong = Malformed;
    let mut rest = bytes
        .strip_prefix(MAGIC)
        .ok_or_else(|| wrong("it is not one, or of another version"))?;
    let mut stacks = Vec::new();
    while !rest.is_empty() {
        let mut take = |count: usize| {
            let (taken, left) = rest.split_at_checked(count)?;
            rest = left;
            Some(taken)
        };
        let short = || wrong("it ends early");
        let head: [u8; 4] = take(4).and_then(|b| b.try_into().ok()).ok_or_else(short)?;
        let field = Field::from_id(head[0]).filter(|_| head[1] == 0);
        let field = field.ok_or_else(|| wrong("an unknown field"))?;
        let length = usize::from(u16::from_le_bytes([head[2], head[3]]));
        if !(1..=MAX_NAME).contains(&length) {
            return Err(wrong("a name of 1 to 64 bytes"));
        }
        let name = take(length).ok_or_else(short)?.to_vec();
        let name = String::from_utf8(name).map_err(|_| wrong("a name that is no text"))?;
        let mut number = || {
            let bytes = take(4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes))
        };
        let (rows, columns) = (number().ok_or_else(short)?, number().ok_or_else(short)?);
        let count = u64::from(rows) * u64::from(columns);
        let columns = columns as usize;
        if count > MAX_ELEMENTS || columns == 0 || columns > field.max_width() {
            return Err(wrong("more rows or columns than there can be"));
        }
        let bytes = take(4 * count as usize).ok_or_else(short)?;
        let (words, _) = bytes.as_chunks::<4>();
        let elements: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        if !field.contains(&elements) {
            return Err(wrong("an element outside of its field"));
        }
        stacks.push(Stack {
            name,
            field,
            columns,
            elements,
        });
    }
    Ok(stacks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack() -> Stack {
        Stack {
            name: "blk.0.attn_qkv".into(),
            field: Field::P29,
            columns: 3,
            elements: vec![0, 1, 2, (1 << 29) - 4, 5, 6],
        }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let large = Stack {
            field: Field::P31,
            columns: 1,
            elements: vec![(1 << 31) - 2],
            ..stack()
        };
        let stacks = vec![stack(), large];
        let bytes = to_bytes(&stacks);
        assert_eq!(from_bytes(&bytes).unwrap(), stacks);
        assert_eq!(from_bytes(MAGIC).unwrap(), []);
        for length in 1..bytes.len() {
            let at_an_end = length == MAGIC.len() || length == to_bytes(&stacks[..1]).len();
            assert_eq!(from_bytes(&bytes[..length]).is_ok(), at_an_end, "{length}");
        }
        for (at, byte) in [(0, b'X'), (4, 2), (6, 3), (7, 1), (8, 65), (10, 0xff)] {
            let mut changed = bytes.clone();
            changed[at] = byte;
            assert!(from_bytes(&changed).is_err(), "byte {at}");
        }
        let outside = Stack {
            elements: vec![0, 1, (1 << 29) - 3],
            ..stack()
        };
        assert!(from_bytes(&to_bytes(&[outside])).is_err());
        let mut endless = to_bytes(&[stack()]);
        let rows = MAGIC.len() + 4 + stack().name.len();
        endless[rows..rows + 4].fill(0xff);
        assert!(from_bytes(&endless).is_err());
    }

    #[test]
    fn masking_is_addition_in_the_field() {
        let p = Field::P29.modulus();
        // Words at and above the modulus are drawn again.
        let mut words = [p, u32::MAX, 5, p - 1, 0].into_iter();
        let masked = mask(Field::P29, &[-7, 3, 0], &mut || words.next().unwrap());
        assert_eq!(masked, [p - 2, 2, 0]);
        assert_eq!(centred(Field::P29, 0), 0.0);
        assert!(centred(Field::P29, p - 1) < 0.0 && centred(Field::P29, p / 2) > 0.99);
    }
}
