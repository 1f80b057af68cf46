//! Deterministic CBOR at the edge: one encoding per value, everything else refused.

use minicbor::{Decode, Encode};
use zeroize::Zeroizing;

use crate::error::{Malformed, bounded};

/// Encodes into a buffer that is wiped when dropped and never grows (growing would leave copies behind): `capacity` is
/// the most that the value takes.
///
/// # Panics
/// Never: writing to memory does not fail.
pub fn encode<T: Encode<()>>(value: &T, capacity: usize) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    minicbor::encode(value, &mut *bytes).expect("writing to memory cannot fail");
    debug_assert!(bytes.len() <= capacity, "the buffer must not have grown");
    bytes
}

/// Decodes and refuses what [`encode`] would not have written: trailing bytes, unknown or repeated
/// keys, other orders, long forms, indefinite lengths. `what` names the object in errors.
///
/// # Errors
/// [`Malformed::TooLarge`], [`Malformed::Cbor`], [`Malformed::NotDeterministic`].
pub fn decode<T>(what: &'static str, bytes: &[u8], limit: usize) -> Result<T, Malformed>
where
    T: Encode<()> + for<'b> Decode<'b, ()>,
{
    bounded(what, bytes, limit)?;
    let value: T = minicbor::decode(bytes).map_err(|_| Malformed::Cbor { what })?;
    if *encode(&value, limit) != *bytes {
        return Err(Malformed::NotDeterministic { what });
    }
    Ok(value)
}

/// Names of models, by the manifest's rule: 1 to 128 bytes of UTF-8 without control characters.
pub(crate) fn check_model_name(what: &'static str, text: &str) -> Result<(), Malformed> {
    if (1..=128).contains(&text.len()) && !text.contains(char::is_control) {
        return Ok(());
    }
    Err(Malformed::Text { what })
}

/// Names of services: 1 to 128 visible ASCII characters.
pub(crate) fn check_name(what: &'static str, text: &str) -> Result<(), Malformed> {
    if (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(Malformed::Text { what })
}
