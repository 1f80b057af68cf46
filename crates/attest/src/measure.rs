//! The development measurement: how the fake TEE describes a process in the fields of a TD report, computed the same
//! way beforehand by `casemate measure`. It holds the arithmetic only; who reads the files, and from where, is up to
//! the caller. A TD's real measurements come from its firmware and are not computed here.
//!
//! | field | value |
//! |---|---|
//! | `mr_td` | SHA-384(`"casemate development measurement: executable\0"` ‖ SHA-384(executable)) |
//! | `rtmr[1]` | extend(0, SHA-384(arguments after the program's name, each followed by NUL)) |
//! | `rtmr[2]` | extend(0, SHA-384(environment, sorted by bytes, each entry followed by NUL)) |
//! | `rtmr[0]`, `rtmr[3]` | zero |
//! | `mr_config_id` | SHA-384(configuration file), zero without one |
//!
//! where extend(a, b) = SHA-384(a ‖ b), as for a TD's run-time registers.

use std::ffi::CStr;

use sha2::{Digest, Sha384};

/// A SHA-384 digest, the width of every TD measurement register.
pub type Register = [u8; 48];

const EXECUTABLE_DOMAIN: &[u8] = b"casemate development measurement: executable\0";

/// The measured fields of a TD report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Initial contents of the TD; here, the executable.
    pub mr_td: Register,
    /// Configuration given at launch; here, the configuration file.
    pub mr_config_id: Register,
    /// Run-time registers; here, arguments in 1 and environment in 2.
    pub rtmr: [Register; 4],
}

impl Measurement {
    /// The `[[measurement]]` entry of a policy that expects exactly this.
    ///
    /// # Errors
    /// [`NameError`] where the name is not one that a policy may have.
    pub fn to_policy_entry(&self, name: &str) -> Result<String, NameError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.: /@+".contains(c);
        if name.is_empty() || name.len() > 128 || !name.chars().all(plain) {
            return Err(NameError);
        }
        let mut entry = format!("[[measurement]]\nname = \"{name}\"\n");
        let fields = [("mr_td", &self.mr_td), ("mr_config_id", &self.mr_config_id)];
        let registers = ["rtmr0", "rtmr1", "rtmr2", "rtmr3"]
            .into_iter()
            .zip(&self.rtmr);
        for (key, value) in fields.into_iter().chain(registers) {
            entry.push_str(&format!("{key} = \"{}\"\n", hex::encode(value)));
        }
        Ok(entry)
    }
}

/// A measurement's name that a policy entry cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a measurement's name has 1 to 128 letters, digits, spaces or characters of -_.:/@+")]
pub struct NameError;

/// What a process was started from.
///
/// Arguments and environment are C strings because a NUL inside one would let two different lists give one digest.
#[derive(Clone, Copy, Debug)]
pub struct Process<'a> {
    /// SHA-384 of the executable file; see [`FileDigest`].
    pub executable: Register,
    /// Arguments after the program's name, in order.
    pub arguments: &'a [&'a CStr],
    /// Environment entries `NAME=value`, in any order.
    pub environment: &'a [&'a CStr],
    /// SHA-384 of the configuration file, if one was named.
    pub config: Option<Register>,
}

impl Measurement {
    /// Measures a process from what it was started from.
    pub fn of_process(process: &Process<'_>) -> Measurement {
        let mut executable = Sha384::new();
        executable.update(EXECUTABLE_DOMAIN);
        executable.update(process.executable);

        let mut sorted: Vec<&CStr> = process.environment.to_vec();
        sorted.sort_unstable();
        Measurement {
            mr_td: executable.finalize().into(),
            mr_config_id: process.config.unwrap_or([0; 48]),
            rtmr: [
                [0; 48],
                extend(&[0; 48], &digest_of_strings(process.arguments)),
                extend(&[0; 48], &digest_of_strings(&sorted)),
                [0; 48],
            ],
        }
    }
}

/// SHA-384 of a file that is fed piece by piece.
#[derive(Clone, Default)]
pub struct FileDigest(Sha384);

impl FileDigest {
    /// SHA-384 of bytes that are all at hand.
    pub fn of(bytes: &[u8]) -> Register {
        Sha384::digest(bytes).into()
    }

    /// Adds the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// The digest of everything added.
    pub fn finish(self) -> Register {
        self.0.finalize().into()
    }
}

/// Extends a run-time register, as TDG.MR.RTMR.EXTEND does.
pub fn extend(register: &Register, digest: &Register) -> Register {
    let mut hash = Sha384::new();
    hash.update(register);
    hash.update(digest);
    hash.finalize().into()
}

fn digest_of_strings(strings: &[&CStr]) -> Register {
    let mut hash = Sha384::new();
    for string in strings {
        hash.update(string.to_bytes_with_nul());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process<'a>(arguments: &'a [&'a CStr], environment: &'a [&'a CStr]) -> Process<'a> {
        Process {
            executable: FileDigest::of(b"program"),
            arguments,
            environment,
            config: Some(FileDigest::of(b"[service]")),
        }
    }

    /// Computed independently with Python's hashlib from the table in the module's header.
    #[test]
    fn equals_values_computed_independently() {
        let got = Measurement::of_process(&process(
            &[c"--config", c"a.toml"],
            &[c"PATH=/bin", c"LANG=C"],
        ));
        assert_eq!(hex::encode(got.mr_td), MR_TD);
        assert_eq!(hex::encode(got.mr_config_id), MR_CONFIG_ID);
        assert_eq!(hex::encode(got.rtmr[1]), RTMR1);
        assert_eq!(hex::encode(got.rtmr[2]), RTMR2);
        assert_eq!((got.rtmr[0], got.rtmr[3]), ([0; 48], [0; 48]));
    }

    #[test]
    fn moves_with_every_input_but_not_with_the_order_of_the_environment() {
        let base = Measurement::of_process(&process(&[c"a", c"b"], &[c"X=1", c"Y=2"]));
        assert_eq!(
            base,
            Measurement::of_process(&process(&[c"a", c"b"], &[c"Y=2", c"X=1"]))
        );
        for arguments in [&[c"b", c"a"][..], &[c"ab"], &[c"a", c"b", c""]] {
            let other = Measurement::of_process(&process(arguments, &[c"X=1", c"Y=2"]));
            assert_ne!(base.rtmr[1], other.rtmr[1], "{arguments:?}");
            assert_eq!(base.rtmr[2], other.rtmr[2]);
        }
        let other = Measurement::of_process(&process(
            &[c"a", c"b"],
            &[c"X=1", c"Y=2", c"LD_PRELOAD=evil.so"],
        ));
        assert_ne!(base.rtmr[2], other.rtmr[2]);
        assert_eq!(base.rtmr[1], other.rtmr[1]);
        let unconfigured = Measurement::of_process(&Process {
            config: None,
            ..process(&[c"a", c"b"], &[c"X=1", c"Y=2"])
        });
        assert_eq!(unconfigured.mr_config_id, [0; 48]);
    }

    #[test]
    fn a_file_in_pieces_has_the_digest_of_the_whole() {
        let mut digest = FileDigest::default();
        digest.update(b"pro");
        digest.update(b"gram");
        assert_eq!(digest.finish(), FileDigest::of(b"program"));
    }

    const MR_TD: &str = "826401c3ef5bca90840c4b904d468c85115ff477a4f66606137de273d6e83c9913493b768006d605450cc9f3f05c4347";
    const MR_CONFIG_ID: &str = "0bf5d6ec6472341e6212e815521171307dcc302d023aa985b53ee68705f7a391e7f75c06cc66828aec3291c7244076c9";
    const RTMR1: &str = "7ae8f65b0f68fed0b8a95946ef3367dbd68c3c4c9e86c1c1b887cf4be8633060eeb7e21b6d9455b16f1bd3104008bdc2";
    const RTMR2: &str = "bdef88a753ddad2134b9288b6fb44726cc8d7f121686fdb94f964053efaa2b803d473f165bf410c8b486eec0bd872a4f";
}
