//! A writer of SentencePiece models that says whatever it is told to.

/// Wire types of protobuf.
const VARINT: u64 = 0;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

pub fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

pub fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3 | VARINT), varint(value)].concat()
}

pub fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    [
        &varint(field << 3 | BYTES),
        &varint(value.len() as u64),
        value,
    ]
    .concat()
}

pub fn float(field: u64, value: f32) -> Vec<u8> {
    [&varint(field << 3 | FIXED32)[..], &value.to_le_bytes()].concat()
}

pub fn piece(text: &[u8], score: f32, kind: u64) -> Vec<u8> {
    bytes(
        1,
        &[bytes(1, text), float(2, score), number(3, kind)].concat(),
    )
}

/// A model to be written: pieces, and the fields of trainer and normalizer.
pub struct Model {
    pub pieces: Vec<Vec<u8>>,
    pub trainer: Vec<u8>,
    pub normalizer: Vec<u8>,
}

impl Model {
    /// The vocabulary of the tiny GGUF file.
    pub fn tiny() -> Self {
        let mut texts: Vec<(String, u64)> = ["<unk>", "<s>", "</s>"]
            .into_iter()
            .zip([2, 3, 3])
            .map(|(text, kind)| (text.to_owned(), kind))
            .collect();
        texts.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6)));
        for text in ["\u{2581}a", "ab", "\u{2581}", "a", "b"] {
            texts.push((text.to_owned(), 1));
        }
        texts.push(("<user>".to_owned(), 4));
        Self {
            pieces: texts
                .iter()
                .enumerate()
                .map(|(id, (text, kind))| piece(text.as_bytes(), -(id as f32), *kind))
                .collect(),
            trainer: [number(3, 2), number(40, 0), number(41, 1)].concat(),
            normalizer: [bytes(1, b"identity"), number(3, 1), number(4, 0)].concat(),
        }
    }

    pub fn write(&self) -> Vec<u8> {
        let mut out = self.pieces.concat();
        out.extend(bytes(2, &self.trainer));
        out.extend(bytes(3, &self.normalizer));
        out
    }
}
