//! The frames an answer travels in: fixed size, and a padded number of them.
//!
//! ```text
//! frame (512 bytes) = length (u16, big endian, 0..=510) ‖ data ‖ zeros
//! ```
//!
//! Frames say nothing about what they carry; the data of all frames together is one binary HTTP
//! message ([`super::message`]).

/// Bytes of a frame.
pub const FRAME_BYTES: usize = 512;
/// The most data a frame can carry.
pub const FRAME_DATA_BYTES: usize = FRAME_BYTES - 2;
/// The fewest frames an answer consists of.
pub const MINIMUM_FRAMES: u64 = 8;

/// The number of frames an answer is padded to when its data need `frames` of them: the next power
/// of two, at least [`MINIMUM_FRAMES`].
pub fn padded_frames(frames: u64) -> u64 {
    frames.max(MINIMUM_FRAMES).next_power_of_two()
}

/// Builds the frame that carries `data`, at most [`FRAME_DATA_BYTES`] of it.
pub(super) fn build(data: &[u8]) -> [u8; FRAME_BYTES] {
    assert!(
        data.len() <= FRAME_DATA_BYTES,
        "the caller splits data into frames"
    );
    let mut frame = [0; FRAME_BYTES];
    frame[..2].copy_from_slice(&(data.len() as u16).to_be_bytes());
    frame[2..2 + data.len()].copy_from_slice(data);
    frame
}

/// The data of a frame, or nothing if its length is out of range or its padding is not zero.
pub(super) fn data(frame: &[u8; FRAME_BYTES]) -> Option<&[u8]> {
    let length = usize::from(u16::from_be_bytes([frame[0], frame[1]]));
    let (data, padding) = frame[2..].split_at_checked(length)?;
    padding.iter().all(|&b| b == 0).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_carry_any_length_up_to_the_limit() {
        let bytes: Vec<u8> = (0..FRAME_DATA_BYTES).map(|i| i as u8 | 1).collect();
        for length in [0, 1, 255, 256, FRAME_DATA_BYTES] {
            let frame = build(&bytes[..length]);
            assert_eq!(data(&frame), Some(&bytes[..length]));
        }
    }

    #[test]
    fn refuses_lengths_out_of_range_and_padding_that_is_not_zero() {
        let mut frame = build(&[]);
        frame[..2].copy_from_slice(&(FRAME_DATA_BYTES as u16 + 1).to_be_bytes());
        assert_eq!(data(&frame), None);

        let mut frame = build(b"abc");
        frame[FRAME_BYTES - 1] = 1;
        assert_eq!(data(&frame), None);
    }

    #[test]
    fn totals_are_powers_of_two_from_eight() {
        for (needed, total) in [
            (0, 8),
            (1, 8),
            (8, 8),
            (9, 16),
            (16, 16),
            (17, 32),
            (1000, 1024),
        ] {
            assert_eq!(padded_frames(needed), total);
        }
    }
}
