//! The keys and listed values of one schema, end to end in one piece of memory.

/// Behind each text: JSON writes no zero byte, so whatever is searched for, no two texts make it together.
const BEHIND: u8 = 0;

#[derive(Default)]
pub(super) struct Texts(Vec<u8>);

/// Where one of them lies.
#[derive(Clone, Copy)]
pub(super) struct Text {
    from: u32,
    len: u16,
}

impl Texts {
    /// `None`: it is longer than places in it are counted, or there is no room behind the others.
    pub(super) fn push(&mut self, text: &[u8]) -> Option<Text> {
        let from = u32::try_from(self.0.len()).ok()?;
        let len = u16::try_from(text.len()).ok()?;
        self.0.extend_from_slice(text);
        self.0.push(BEHIND);
        Some(Text { from, len })
    }

    pub(super) fn get(&self, text: Text) -> &[u8] {
        &self.0[text.from as usize..][..usize::from(text.len)]
    }

    pub(super) fn all(&self) -> &[u8] {
        &self.0
    }

    /// Without memory that it does not need.
    pub(super) fn shrunk(mut self) -> Self {
        self.0.shrink_to_fit();
        self
    }

    /// The memory that it takes.
    pub(super) fn bytes(&self) -> usize {
        self.0.capacity()
    }
}
