//! The structure of Intel's quotes: version 3 (SGX), 4 (TDX) and 5 (TDX 1.0, 1.5 and 1.5 extended). Parsing only:
//! whether anybody signed the quote is decided elsewhere.
//!
//! ```text
//! header   48  version u16 | key type u16 | TEE u32 | QE SVN u16 | PCE SVN u16 | QE vendor 16 | user data 20
//! body type 2 + size 4 (version 5 only)
//! report       384 SGX | 584 TD 1.0 | 648 TD 1.5 | 885 TD 1.5 extended
//! length    4  of what follows
//! signature 64 | attestation key 64 |
//!   version 3:      QE report 384 | its signature 64 | auth data (u16 length) | certification data (u16 type, u32 length)
//!   version 4, 5:   certification data of type 6, which wraps the same four
//! padding      zeros
//! ```
//!
//! Every length must account for exactly the bytes it covers. After the quote only zero bytes are tolerated: guests
//! read quotes from fixed buffers (configfs, /dev/tdx_guest, vTPM NV indices) and pass the whole buffer on. The
//! padding is covered by no signature, so anything else there could smuggle data past a verifier and is refused.

use serde::Serialize;

use crate::denial::Denial;
use crate::evidence::{MAX_QUOTE, TeeKind};
use crate::report_data::ReportData;
use crate::text::{hex_bytes, hex_list};

/// A quote's structure; nothing about it is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    version: u16,
    report: Report,
    certification_type: u16,
    certification_data: Vec<u8>,
    len: usize,
}

/// The report inside a quote: what the TEE says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// A trust domain's.
    Td(Box<TdReport>),
    /// An SGX enclave's.
    Sgx(Box<SgxReport>),
}

/// A TD report body (`TDREPORT` as quoted), all byte strings in the order of the quote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TdReport {
    /// SVNs of the TDX module and of the processor's TEE firmware at launch.
    #[serde(with = "hex_bytes")]
    pub tee_tcb_svn: [u8; 16],
    /// Measurement of the TDX module.
    #[serde(with = "hex_bytes")]
    pub mr_seam: [u8; 48],
    /// Signer of the TDX module; zeros for Intel's own.
    #[serde(with = "hex_bytes")]
    pub mr_signer_seam: [u8; 48],
    /// Attributes of the TDX module.
    #[serde(with = "hex_bytes")]
    pub seam_attributes: [u8; 8],
    /// Attributes of the TD, little-endian.
    #[serde(with = "hex_bytes")]
    pub td_attributes: [u8; 8],
    /// Extended processor features the TD may use, little-endian.
    #[serde(with = "hex_bytes")]
    pub xfam: [u8; 8],
    /// Measurement of the TD's initial contents.
    #[serde(with = "hex_bytes")]
    pub mr_td: [u8; 48],
    /// Configuration that the host gave at launch.
    #[serde(with = "hex_bytes")]
    pub mr_config_id: [u8; 48],
    /// Owner that the host gave at launch.
    #[serde(with = "hex_bytes")]
    pub mr_owner: [u8; 48],
    /// Owner's configuration that the host gave at launch.
    #[serde(with = "hex_bytes")]
    pub mr_owner_config: [u8; 48],
    /// Run-time measurement registers.
    #[serde(with = "hex_list")]
    pub rtmr: [[u8; 48]; 4],
    /// What the software in the TD asked to have signed.
    pub report_data: ReportData,
    /// Measurement of the service TDs bound to this one (TDX 1.5); zeros where there is none.
    #[serde(with = "hex_bytes")]
    pub mr_service_td: [u8; 48],
    /// Hash of the service TDs bound now (TDX 1.5 extended); zeros where there is none.
    #[serde(with = "hex_bytes")]
    pub current_service_td: [u8; 48],
}

/// An SGX report body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SgxReport {
    /// Enclave attributes: flags and XFRM, little-endian each.
    #[serde(with = "hex_bytes")]
    pub attributes: [u8; 16],
    /// MISCSELECT.
    pub misc_select: u32,
    /// Measurement of the enclave's initial contents.
    #[serde(with = "hex_bytes")]
    pub mr_enclave: [u8; 32],
    /// Hash of the key that signed the enclave.
    #[serde(with = "hex_bytes")]
    pub mr_signer: [u8; 32],
    /// The signer's product number.
    pub isv_prod_id: u16,
    /// The signer's security version.
    pub isv_svn: u16,
    /// Configuration that the host gave at launch (KSS); zeros without it.
    #[serde(with = "hex_bytes")]
    pub config_id: [u8; 64],
    /// What the software in the enclave asked to have signed.
    pub report_data: ReportData,
}

/// Bytes that are no quote this room can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("quote: {field} at byte {offset}: {fault}")]
pub struct QuoteError {
    /// The part that was being read.
    pub field: &'static str,
    /// Where it starts.
    pub offset: usize,
    /// What is wrong with it.
    pub fault: QuoteFault,
}

/// What is wrong with a part of a quote.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuoteFault {
    /// The bytes end too early.
    #[error("needs {needed} bytes, {left} are left")]
    Truncated {
        /// Bytes needed.
        needed: usize,
        /// Bytes left.
        left: usize,
    },
    /// A version, kind or type that this room does not know. Unknown means refused.
    #[error("unsupported value {found}, expected {expected}")]
    Unsupported {
        /// The value found.
        found: u32,
        /// The values this room reads.
        expected: &'static str,
    },
    /// A length covers more bytes than its contents.
    #[error("{extra} bytes follow the contents")]
    Excess {
        /// How many.
        extra: usize,
    },
    /// Bytes other than zero follow the quote.
    #[error("bytes other than zero padding follow the quote")]
    TrailingData,
    /// More bytes than this room looks at.
    #[error("{len} bytes, more than the limit")]
    TooLarge {
        /// How many.
        len: usize,
    },
}

const SGX_REPORT: usize = 384;
const TD_REPORT_10: usize = 584;
const TD_REPORT_15: usize = 648;
const TD_REPORT_15_EX: usize = 885;
const KEY_ECDSA_P256: u16 = 2;
const CERTIFICATION_QE_REPORT: u16 = 6;

impl Quote {
    /// Reads a quote.
    ///
    /// # Errors
    /// [`QuoteError`] naming the part that is not as Intel's format has it.
    pub fn parse(bytes: &[u8]) -> Result<Quote, QuoteError> {
        if bytes.len() > MAX_QUOTE {
            let fault = QuoteFault::TooLarge { len: bytes.len() };
            return Err(QuoteError {
                field: "quote",
                offset: 0,
                fault,
            });
        }
        let mut reader = Reader { bytes, at: 0 };
        let version = reader.u16("header.version")?;
        if !(3..=5).contains(&version) {
            return Err(reader.unsupported("header.version", 0, version, "3, 4 or 5"));
        }
        let key_type = reader.u16("header.attestation_key_type")?;
        if key_type != KEY_ECDSA_P256 {
            return Err(reader.unsupported(
                "header.attestation_key_type",
                2,
                key_type,
                "2 (ECDSA P-256)",
            ));
        }
        let tee = match (reader.u32("header.tee_type")?, version) {
            (0x00, 3) => TeeKind::Sgx,
            (0x81, 4 | 5) => TeeKind::Tdx,
            (found, 3) => {
                return Err(reader.unsupported("header.tee_type", 4, found, "0 (SGX)"));
            }
            (found, _) => {
                return Err(reader.unsupported("header.tee_type", 4, found, "129 (TDX)"));
            }
        };
        reader.take(4, "header.svn")?;
        reader.take(16, "header.qe_vendor_id")?;
        reader.take(20, "header.user_data")?;

        let report = match tee {
            TeeKind::Sgx => Report::Sgx(Box::new(reader.sgx_report()?)),
            TeeKind::Tdx => Report::Td(Box::new(reader.td_report(version)?)),
        };
        let (certification_type, certification_data) = reader.authentication(version)?;
        let len = reader.at;
        if bytes[len..].iter().any(|&byte| byte != 0) {
            let fault = QuoteFault::TrailingData;
            return Err(QuoteError {
                field: "padding",
                offset: len,
                fault,
            });
        }
        Ok(Quote {
            version,
            report,
            certification_type,
            certification_data,
            len,
        })
    }

    /// The format's version: 3, 4 or 5.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The kind of TEE.
    pub fn tee(&self) -> TeeKind {
        match self.report {
            Report::Td(_) => TeeKind::Tdx,
            Report::Sgx(_) => TeeKind::Sgx,
        }
    }

    /// What the TEE says about itself, **unverified**.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Length in bytes without padding; never zero.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn into_report(self) -> Report {
        self.report
    }

    /// The certificate chain of the platform's key, where the quote carries one.
    pub(crate) fn pck_chain(&self) -> Option<&[u8]> {
        (self.certification_type == 5).then_some(&self.certification_data)
    }
}

impl Report {
    /// What the software in the TEE asked to have signed.
    pub fn report_data(&self) -> &ReportData {
        match self {
            Report::Td(report) => &report.report_data,
            Report::Sgx(report) => &report.report_data,
        }
    }

    /// The TD report, for TDX.
    pub fn td(&self) -> Option<&TdReport> {
        match self {
            Report::Td(report) => Some(report),
            Report::Sgx(_) => None,
        }
    }

    /// The enclave report, for SGX.
    pub fn sgx(&self) -> Option<&SgxReport> {
        match self {
            Report::Sgx(report) => Some(report),
            Report::Td(_) => None,
        }
    }
}

/// Takes fields off the front and remembers where it is.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], QuoteError> {
        let left = self.bytes.len() - self.at;
        if len > left {
            let fault = QuoteFault::Truncated { needed: len, left };
            return Err(QuoteError {
                field,
                offset: self.at,
                fault,
            });
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], QuoteError> {
        let taken = self.take(N, field)?;
        Ok(taken
            .try_into()
            .expect("take returns as many bytes as asked"))
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, QuoteError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, QuoteError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    /// Takes a block with a 32-bit length in front and gives a reader that ends where the block ends. Its offsets
    /// remain those of the quote.
    fn block(&mut self, field: &'static str) -> Result<Reader<'a>, QuoteError> {
        // A length that does not fit would not fit the quote either.
        let len = usize::try_from(self.u32(field)?).unwrap_or(usize::MAX);
        let start = self.at;
        self.take(len, field)?;
        Ok(Reader {
            bytes: &self.bytes[..self.at],
            at: start,
        })
    }

    fn finish(&self, field: &'static str) -> Result<(), QuoteError> {
        let extra = self.bytes.len() - self.at;
        if extra != 0 {
            let fault = QuoteFault::Excess { extra };
            return Err(QuoteError {
                field,
                offset: self.at,
                fault,
            });
        }
        Ok(())
    }

    fn unsupported(
        &self,
        field: &'static str,
        offset: usize,
        found: impl Into<u32>,
        expected: &'static str,
    ) -> QuoteError {
        let fault = QuoteFault::Unsupported {
            found: found.into(),
            expected,
        };
        QuoteError {
            field,
            offset,
            fault,
        }
    }

    fn sgx_report(&mut self) -> Result<SgxReport, QuoteError> {
        let start = self.at;
        self.take(16, "report.cpu_svn")?;
        let misc_select = self.u32("report.misc_select")?;
        self.take(28, "report.isv_ext_prod_id")?;
        let attributes = self.array("report.attributes")?;
        let mr_enclave = self.array("report.mr_enclave")?;
        self.take(32, "report.reserved")?;
        let mr_signer = self.array("report.mr_signer")?;
        self.take(32, "report.reserved")?;
        let config_id = self.array("report.config_id")?;
        let isv_prod_id = self.u16("report.isv_prod_id")?;
        let isv_svn = self.u16("report.isv_svn")?;
        self.take(60, "report.config_svn")?;
        let report_data = ReportData::new(self.array("report.report_data")?);
        debug_assert_eq!(self.at - start, SGX_REPORT);
        Ok(SgxReport {
            attributes,
            misc_select,
            mr_enclave,
            mr_signer,
            isv_prod_id,
            isv_svn,
            config_id,
            report_data,
        })
    }

    fn td_report(&mut self, version: u16) -> Result<TdReport, QuoteError> {
        let size = if version == 5 {
            let offset = self.at;
            let body_type = self.u16("body.type")?;
            let size = match body_type {
                2 => TD_REPORT_10,
                3 => TD_REPORT_15,
                4 => TD_REPORT_15_EX,
                found => {
                    return Err(self.unsupported("body.type", offset, found, "2, 3 or 4 (a TD)"));
                }
            };
            let offset = self.at;
            let stated = self.u32("body.size")?;
            if usize::try_from(stated) != Ok(size) {
                let expected = "the size of the body's type";
                return Err(self.unsupported("body.size", offset, stated, expected));
            }
            size
        } else {
            TD_REPORT_10
        };
        let start = self.at;
        let mut report = TdReport {
            tee_tcb_svn: self.array("report.tee_tcb_svn")?,
            mr_seam: self.array("report.mr_seam")?,
            mr_signer_seam: self.array("report.mr_signer_seam")?,
            seam_attributes: self.array("report.seam_attributes")?,
            td_attributes: self.array("report.td_attributes")?,
            xfam: self.array("report.xfam")?,
            mr_td: self.array("report.mr_td")?,
            mr_config_id: self.array("report.mr_config_id")?,
            mr_owner: self.array("report.mr_owner")?,
            mr_owner_config: self.array("report.mr_owner_config")?,
            rtmr: [
                self.array("report.rtmr0")?,
                self.array("report.rtmr1")?,
                self.array("report.rtmr2")?,
                self.array("report.rtmr3")?,
            ],
            report_data: ReportData::new(self.array("report.report_data")?),
            mr_service_td: [0; 48],
            current_service_td: [0; 48],
        };
        if size >= TD_REPORT_15 {
            self.take(16, "report.tee_tcb_svn2")?;
            report.mr_service_td = self.array("report.mr_service_td")?;
        }
        if size == TD_REPORT_15_EX {
            // VM index, TD id, device information, and the service TD and TCB at creation, which mr_service_td and
            // tee_tcb_svn repeat.
            self.take(1 + 32 + 48 + 48 + 8 + 16 + 16 + 12, "report.creation")?;
            report.current_service_td = self.array("report.current_service_td")?;
            self.take(8, "report.current_service_td_attributes")?;
        }
        debug_assert_eq!(self.at - start, size);
        Ok(report)
    }

    /// Reads signature, key and certification data; gives the type and contents of the innermost certification data.
    fn authentication(&mut self, version: u16) -> Result<(u16, Vec<u8>), QuoteError> {
        let mut block = self.block("authentication")?;
        block.take(64, "authentication.signature")?;
        block.take(64, "authentication.key")?;
        if version == 3 {
            let certification = block.qe_certification()?;
            block.finish("authentication")?;
            return Ok(certification);
        }
        let offset = block.at;
        let outer = block.u16("authentication.certification_type")?;
        if outer != CERTIFICATION_QE_REPORT {
            return Err(block.unsupported(
                "authentication.certification_type",
                offset,
                outer,
                "6 (QE report)",
            ));
        }
        let mut inner = block.block("authentication.certification")?;
        block.finish("authentication")?;
        let certification = inner.qe_certification()?;
        inner.finish("authentication.certification")?;
        Ok(certification)
    }

    fn qe_certification(&mut self) -> Result<(u16, Vec<u8>), QuoteError> {
        self.take(SGX_REPORT, "qe_report")?;
        self.take(64, "qe_report.signature")?;
        let auth_len = self.u16("qe_auth_data")?;
        self.take(usize::from(auth_len), "qe_auth_data")?;
        let offset = self.at;
        let certification_type = self.u16("certification.type")?;
        if !(1..=5).contains(&certification_type) {
            return Err(self.unsupported(
                "certification.type",
                offset,
                certification_type,
                "1 to 5",
            ));
        }
        let data = self.block("certification.data")?;
        Ok((certification_type, data.bytes[data.at..].to_vec()))
    }
}

impl From<QuoteError> for Denial {
    fn from(error: QuoteError) -> Denial {
        let expected = match error.fault {
            QuoteFault::Unsupported { expected, .. } => expected,
            QuoteFault::TrailingData => "nothing but zero padding after the quote",
            _ => "a quote of version 3 (SGX), 4 or 5 (TDX)",
        };
        Denial::malformed(
            "quote.structure",
            error.to_string(),
            expected,
            "check that the quote is of a supported TEE and arrived whole",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_unknown_versions_kinds_and_keys_by_name() {
        let header = |version: u16, key: u16, tee: u32| {
            let mut bytes = vec![0; 6000];
            bytes[..2].copy_from_slice(&version.to_le_bytes());
            bytes[2..4].copy_from_slice(&key.to_le_bytes());
            bytes[4..8].copy_from_slice(&tee.to_le_bytes());
            Quote::parse(&bytes).unwrap_err()
        };
        for version in [0, 1, 2, 6, 0xffff] {
            assert_eq!(header(version, 2, 0).field, "header.version");
        }
        assert_eq!(header(4, 3, 0x81).field, "header.attestation_key_type");
        for (version, tee) in [(3, 0x81), (4, 0), (5, 0), (4, 0x82)] {
            assert_eq!(
                header(version, 2, tee).field,
                "header.tee_type",
                "{version} {tee}"
            );
        }
        assert_eq!(header(5, 2, 0x81).field, "body.type");
    }

    #[test]
    fn refuses_every_prefix_of_nothing() {
        for len in 0..700 {
            let mut bytes = vec![0; len];
            bytes
                .iter_mut()
                .zip([4, 0, 2, 0, 0x81])
                .for_each(|(to, from)| *to = from);
            let error = Quote::parse(&bytes).unwrap_err();
            assert!(
                matches!(error.fault, QuoteFault::Truncated { .. }),
                "{len}: {error}"
            );
        }
    }
}
