//! Attacks on the sealed model where it lies. The host owns the disk: it can put any bytes in the model's place before
//! an enclave starts.

use std::fs;
use std::ops::Range;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf;
use casemate_container::{DataKey, Header, SealedFile};

use super::{Ground, Miss, Refusal};

const HEADER: usize = 104;
const TAG: usize = 16;

/// A sealed file in memory.
struct Sealed {
    bytes: Vec<u8>,
    header: Header,
}

impl Sealed {
    fn read(path: &std::path::Path) -> Result<Sealed, Miss> {
        Ok(Sealed {
            bytes: fs::read(path)?,
            header: SealedFile::open(path)?.header().clone(),
        })
    }

    /// Where a chunk lies with its tag.
    fn chunk(&self, index: u64) -> Result<Range<usize>, Miss> {
        let front = HEADER as u64 + self.header.manifest_section_len();
        let start = front + index * (self.header.chunk_len() + TAG as u64);
        let rest = self
            .header
            .payload_len()
            .checked_sub(index * self.header.chunk_len());
        let plain = rest
            .filter(|rest| *rest > 0)
            .map(|rest| rest.min(self.header.chunk_len()));
        let plain = plain.ok_or_else(|| Miss::Broken(format!("the model has no chunk {index}")))?;
        Ok(usize::try_from(start)?..usize::try_from(start + plain)? + TAG)
    }
}

/// Puts other bytes in the model's place, starts an enclave, and puts the model back.
fn start_over(ground: &Ground, bytes: &[u8]) -> Result<Refusal, Miss> {
    let path = &ground.sealed.path;
    let genuine = fs::read(path)?;
    if genuine == bytes {
        return Err(Miss::Broken("nothing was changed".into()));
    }
    fs::write(path, bytes)?;
    let refusal = ground.refused_start(&ground.enclave_launch());
    fs::write(path, genuine)?;
    refusal
}

pub(super) fn flipped_bit(ground: &mut Ground) -> Result<Refusal, Miss> {
    let mut sealed = Sealed::read(&ground.sealed.path)?;
    let at = sealed.chunk(1)?.start + 4242;
    sealed.bytes[at] ^= 1;
    start_over(ground, &sealed.bytes)
}

pub(super) fn swapped_chunks(ground: &mut Ground) -> Result<Refusal, Miss> {
    let mut sealed = Sealed::read(&ground.sealed.path)?;
    let (first, second) = (sealed.chunk(0)?, sealed.chunk(1)?);
    if first.len() != second.len() {
        return Err(Miss::Broken(
            "the model has no two chunks of one size".into(),
        ));
    }
    let (front, back) = sealed.bytes.split_at_mut(second.start);
    front[first].swap_with_slice(&mut back[..second.len()]);
    start_over(ground, &sealed.bytes)
}

pub(super) fn truncated(ground: &mut Ground) -> Result<Refusal, Miss> {
    let sealed = Sealed::read(&ground.sealed.path)?;
    let last = sealed.chunk(sealed.header.chunks() - 1)?;
    start_over(ground, &sealed.bytes[..last.start])
}

pub(super) fn spliced(ground: &mut Ground) -> Result<Refusal, Miss> {
    let mut sealed = Sealed::read(&ground.sealed.path)?;
    let other = Sealed::read(&ground.older.path)?;
    let (to, from) = (sealed.chunk(1)?, other.chunk(1)?);
    sealed.bytes[to].copy_from_slice(&other.bytes[from]);
    start_over(ground, &sealed.bytes)
}

pub(super) fn older_version(ground: &mut Ground) -> Result<Refusal, Miss> {
    let older = fs::read(&ground.older.path)?;
    start_over(ground, &older)
}

/// Opens one chunk with the data key, changes a weight in it and seals it again: everything but the digest of the
/// tensor, which the provider signed, stays valid.
pub(super) fn other_weights(ground: &mut Ground) -> Result<Refusal, Miss> {
    let mut sealed = Sealed::read(&ground.sealed.path)?;
    let data_key = DataKey::read_file(&ground.deployment.keys()?.data_key)?;
    let digest = hex::decode(&ground.sealed.digest)?;
    let index = 1;
    let place = sealed.chunk(index)?;
    let salt = &sealed.bytes[40..72];
    let file_id = &sealed.bytes[24..40];
    let key = payload_key(&data_key, salt, file_id, &digest)?;

    let mut aad = digest.clone();
    aad.extend_from_slice(&index.to_be_bytes());
    aad.push(u8::from(index + 1 == sealed.header.chunks()));
    let nonce = || {
        let mut nonce = [0; NONCE_LEN];
        nonce[4..].copy_from_slice(&index.to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    };
    let mut chunk = sealed.bytes[place.clone()].to_vec();
    let plain = key.open_in_place(nonce(), Aad::from(&aad), &mut chunk)?;
    plain[4242] ^= 1;
    let mut chunk = plain.to_vec();
    key.seal_in_place_append_tag(nonce(), Aad::from(&aad), &mut chunk)?;
    sealed.bytes[place].copy_from_slice(&chunk);
    start_over(ground, &sealed.bytes)
}

/// The key schedule of docs/container-format.md, section 3, as an attacker would write it.
fn payload_key(
    data_key: &DataKey,
    salt: &[u8],
    file_id: &[u8],
    digest: &[u8],
) -> Result<LessSafeKey, Miss> {
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(data_key.expose());
    let info = [b"casemate/1 payload key\0", file_id, digest];
    let mut key = [0; 32];
    prk.expand(&info, hkdf::HKDF_SHA256)?.fill(&mut key)?;
    Ok(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key)?))
}
