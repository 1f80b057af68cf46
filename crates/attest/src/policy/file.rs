//! The TOML of a policy file: its shape, and the way from there to a [`Policy`] with every value checked.

use std::collections::BTreeSet;

use serde::Deserialize;
use toml::Spanned;

use super::{ModelPolicy, Policy, PolicyError, PolicyFault, ServicePolicy, TcbAllowance};
use crate::evidence::TeeKind;
use crate::genuine::INTEL_ROOT_SPKI_SHA256;
use crate::reference::{Measurement, Reference, SgxIdentity, SgxMeasurement, TdMeasurement};
use crate::tcb_status::TcbStatus;

const MAX_ENTRIES: usize = 256;
const MAX_NAME: usize = 128;
const MAX_EVIDENCE_AGE: u64 = 86_400;

/// Reads a policy without its digest.
pub(super) fn read(text: &str) -> Result<Policy, PolicyError> {
    let raw: RawPolicy = toml::from_str(text).map_err(|error| PolicyError {
        line: error.span().map(|span| line_of(text, span.start)),
        fault: PolicyFault::Toml(error.message().to_owned()),
    })?;
    raw.check().map_err(|(at, fault)| PolicyError {
        line: at.map(|at| line_of(text, at)),
        fault,
    })
}

fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().iter().take(at);
    1 + before.filter(|&&byte| byte == b'\n').count()
}

/// A position in the file, where there is one, and the fault there.
type Fault = (Option<usize>, PolicyFault);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    version: Spanned<u64>,
    tee: Spanned<Vec<Spanned<String>>>,
    dangerous_development_root: Option<Spanned<String>>,
    tcb: RawTcb,
    tdx: Option<RawTdx>,
    #[serde(default)]
    measurement: Vec<Spanned<RawMeasurement>>,
    model: Option<RawModel>,
    service: Option<RawService>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTcb {
    accept: Option<Vec<Spanned<String>>>,
    minimum_evaluation_data_number: u32,
    #[serde(default)]
    allow: Vec<RawAllowance>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAllowance {
    status: Spanned<String>,
    until: Spanned<String>,
    advisories: Option<Vec<Spanned<String>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTdx {
    service_td: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMeasurement {
    name: Spanned<String>,
    // TDX
    mr_td: Option<Spanned<String>>,
    mr_config_id: Option<Spanned<String>>,
    #[serde(default)]
    dangerous_any_mr_config_id: bool,
    rtmr0: Option<Spanned<String>>,
    rtmr1: Option<Spanned<String>>,
    rtmr2: Option<Spanned<String>>,
    rtmr3: Option<Spanned<String>>,
    #[serde(default)]
    dangerous_any_rtmr: Vec<Spanned<u8>>,
    mr_seam: Option<Spanned<String>>,
    mr_owner: Option<Spanned<String>>,
    mr_owner_config: Option<Spanned<String>>,
    td_attributes: Option<Spanned<String>>,
    xfam: Option<Spanned<String>>,
    // SGX
    mr_enclave: Option<Spanned<String>>,
    mr_signer: Option<Spanned<String>>,
    isv_prod_id: Option<u16>,
    minimum_isv_svn: Option<u16>,
    config_id: Option<Spanned<String>>,
    attributes: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    digests: Spanned<Vec<Spanned<String>>>,
    minimum_version: u64,
    adapters: Option<Spanned<Vec<Spanned<String>>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    issuer: Spanned<String>,
    name: Spanned<String>,
    maximum_evidence_age_seconds: Spanned<u64>,
}

impl RawPolicy {
    fn check(self) -> Result<Policy, Fault> {
        if *self.version.get_ref() == 0 {
            return Err(value("version", &self.version, "a number from 1 on"));
        }
        let mut tee = Vec::new();
        for kind in self.tee.get_ref() {
            let parsed = kind
                .get_ref()
                .parse::<TeeKind>()
                .map_err(|()| value("tee", kind, r#""tdx" or "sgx""#))?;
            if tee.contains(&parsed) {
                return Err(repeated("tee", kind));
            }
            tee.push(parsed);
        }
        if tee.is_empty() {
            return Err(count(self.tee.span().start, "tee", 0, "at least one"));
        }

        let root_key = "dangerous_development_root";
        let development_root = self.dangerous_development_root;
        let dangerous_development_root = optional_hex(root_key, development_root.as_ref())?;
        if let Some(root) = &development_root
            && dangerous_development_root == Some(INTEL_ROOT_SPKI_SHA256)
        {
            return Err(value(root_key, root, "a development root, not Intel's own"));
        }

        for status in self.tcb.accept.iter().flatten() {
            if status.get_ref() != "UpToDate" {
                let expected = r#""UpToDate"; anything else needs a [[tcb.allow]] with a deadline"#;
                return Err(value("tcb.accept", status, expected));
            }
        }
        let allowances = self.tcb.allow;
        if allowances.len() > MAX_ENTRIES {
            let start = allowances[0].status.span().start;
            return Err(count(start, "tcb.allow", allowances.len(), "at most 256"));
        }
        let mut tcb_allowances = Vec::new();
        for allowance in allowances {
            let checked = allowance.check()?;
            tcb_allowances.push(checked);
        }

        let mut service_tds = Vec::new();
        for entry in self.tdx.iter().flat_map(|tdx| &tdx.service_td) {
            service_tds.push(hex_array("tdx.service_td", entry)?);
        }

        let measurements = check_measurements(self.measurement, &tee)?;
        let model = self.model.map(RawModel::check).transpose()?;
        let service = self.service.map(RawService::check).transpose()?;
        Ok(Policy {
            version: self.version.into_inner(),
            digest: [0; 32],
            tee,
            dangerous_development_root,
            minimum_tcb_evaluation_data_number: self.tcb.minimum_evaluation_data_number,
            tcb_allowances,
            service_tds,
            measurements,
            model,
            service,
        })
    }
}

fn check_measurements(
    entries: Vec<Spanned<RawMeasurement>>,
    tee: &[TeeKind],
) -> Result<Vec<Measurement>, Fault> {
    let key = "measurement";
    let Some(first) = entries.first() else {
        let remedy = "add at least one [[measurement]], as `casemate measure` writes it";
        return Err((None, PolicyFault::Missing { key, remedy }));
    };
    if entries.len() > MAX_ENTRIES {
        return Err(count(first.span().start, key, entries.len(), "at most 256"));
    }
    let mut measurements: Vec<Measurement> = Vec::new();
    for entry in entries {
        let start = entry.span().start;
        let entry = entry.into_inner();
        let name = entry.name.clone();
        let measurement = entry.check(start)?;
        if measurements
            .iter()
            .any(|other| other.name() == measurement.name())
        {
            return Err(repeated("measurement.name", &name));
        }
        if !tee.contains(&measurement.tee()) {
            let expected = "a measurement of a kind that tee lists";
            return Err(value("measurement.name", &name, expected));
        }
        measurements.push(measurement);
    }
    for kind in tee {
        if !measurements
            .iter()
            .any(|measurement| measurement.tee() == *kind)
        {
            let remedy = "each kind that tee lists needs at least one";
            return Err((None, PolicyFault::Missing { key, remedy }));
        }
    }
    Ok(measurements)
}

impl RawAllowance {
    fn check(self) -> Result<TcbAllowance, Fault> {
        let expected = "a TCB status of Intel's other than UpToDate and Revoked";
        let status = self
            .status
            .get_ref()
            .parse()
            .ok()
            .filter(|status| ![TcbStatus::UpToDate, TcbStatus::Revoked].contains(status))
            .ok_or_else(|| value("tcb.allow.status", &self.status, expected))?;
        let until = self.until.get_ref().parse().map_err(|_| {
            value(
                "tcb.allow.until",
                &self.until,
                "a time such as 2027-01-01T00:00:00Z",
            )
        })?;
        let advisories = match self.advisories {
            None => None,
            Some(list) => {
                let mut advisories = BTreeSet::new();
                for advisory in list {
                    let name = advisory.get_ref();
                    let plain = name.bytes().all(|byte| byte.is_ascii_graphic());
                    if name.is_empty() || name.len() > MAX_NAME || !plain {
                        let expected = "an advisory such as INTEL-SA-00837";
                        return Err(value("tcb.allow.advisories", &advisory, expected));
                    }
                    if !advisories.insert(name.clone()) {
                        return Err(repeated("tcb.allow.advisories", &advisory));
                    }
                }
                Some(advisories)
            }
        };
        Ok(TcbAllowance {
            status,
            until,
            advisories,
        })
    }
}

impl RawMeasurement {
    fn check(self, start: usize) -> Result<Measurement, Fault> {
        let name = plain_name("measurement.name", &self.name)?;
        if self.mr_td.is_some() {
            self.check_td(start, name)
        } else {
            self.check_sgx(start, name)
        }
    }

    fn check_td(self, start: usize, name: String) -> Result<Measurement, Fault> {
        let foreign = [
            ("mr_enclave", self.mr_enclave.is_some()),
            ("mr_signer", self.mr_signer.is_some()),
            ("isv_prod_id", self.isv_prod_id.is_some()),
            ("minimum_isv_svn", self.minimum_isv_svn.is_some()),
            ("config_id", self.config_id.is_some()),
            ("attributes", self.attributes.is_some()),
        ];
        no_foreign_key(start, "mr_td", &foreign)?;
        let Some(mr_td) = optional_hex("measurement.mr_td", self.mr_td.as_ref())? else {
            return Err(missing(
                start,
                "measurement.mr_td",
                "every TDX entry needs it",
            ));
        };
        let mr_config_id = reference(
            start,
            "measurement.mr_config_id",
            self.mr_config_id.as_ref(),
            "dangerous_any_mr_config_id",
            self.dangerous_any_mr_config_id,
            "give its value, or write dangerous_any_mr_config_id = true",
        )?;
        let mut any = [false; 4];
        for index in &self.dangerous_any_rtmr {
            let Some(slot) = any.get_mut(usize::from(*index.get_ref())) else {
                return Err(value("dangerous_any_rtmr", index, "numbers from 0 to 3"));
            };
            if std::mem::replace(slot, true) {
                return Err(repeated("dangerous_any_rtmr", index));
            }
        }
        let mut rtmr = [Reference::Any; 4];
        let given = [&self.rtmr0, &self.rtmr1, &self.rtmr2, &self.rtmr3];
        for (index, given) in given.into_iter().enumerate() {
            let (key, remedy) = RTMR_KEYS[index];
            let other = "dangerous_any_rtmr";
            rtmr[index] = reference(start, key, given.as_ref(), other, any[index], remedy)?;
        }
        Ok(Measurement::Td(Box::new(TdMeasurement {
            name,
            mr_td,
            mr_config_id,
            rtmr,
            mr_seam: optional_hex("measurement.mr_seam", self.mr_seam.as_ref())?,
            mr_owner: optional_hex("measurement.mr_owner", self.mr_owner.as_ref())?,
            mr_owner_config: optional_hex(
                "measurement.mr_owner_config",
                self.mr_owner_config.as_ref(),
            )?,
            td_attributes: optional_hex("measurement.td_attributes", self.td_attributes.as_ref())?,
            xfam: optional_hex("measurement.xfam", self.xfam.as_ref())?,
        })))
    }

    fn check_sgx(self, start: usize, name: String) -> Result<Measurement, Fault> {
        let foreign = [
            ("mr_config_id", self.mr_config_id.is_some()),
            (
                "dangerous_any_mr_config_id",
                self.dangerous_any_mr_config_id,
            ),
            ("rtmr0", self.rtmr0.is_some()),
            ("rtmr1", self.rtmr1.is_some()),
            ("rtmr2", self.rtmr2.is_some()),
            ("rtmr3", self.rtmr3.is_some()),
            ("dangerous_any_rtmr", !self.dangerous_any_rtmr.is_empty()),
            ("mr_seam", self.mr_seam.is_some()),
            ("mr_owner", self.mr_owner.is_some()),
            ("mr_owner_config", self.mr_owner_config.is_some()),
            ("td_attributes", self.td_attributes.is_some()),
            ("xfam", self.xfam.is_some()),
        ];
        let mr_enclave = optional_hex("measurement.mr_enclave", self.mr_enclave.as_ref())?;
        let mr_signer = optional_hex("measurement.mr_signer", self.mr_signer.as_ref())?;
        let identity = match (mr_enclave, mr_signer) {
            (None, None) => {
                let remedy = "a TDX entry needs mr_td, an SGX entry mr_enclave or mr_signer";
                return Err(missing(start, "measurement.mr_td", remedy));
            }
            (Some(_), Some(_)) => {
                return Err(conflict(
                    start,
                    "measurement.mr_enclave",
                    "measurement.mr_signer",
                ));
            }
            (Some(mr_enclave), None) => {
                let foreign = [
                    ("isv_prod_id", self.isv_prod_id.is_some()),
                    ("minimum_isv_svn", self.minimum_isv_svn.is_some()),
                ];
                no_foreign_key(start, "mr_enclave", &foreign)?;
                SgxIdentity::Enclave(mr_enclave)
            }
            (None, Some(mr_signer)) => {
                let remedy = "mr_signer needs isv_prod_id and minimum_isv_svn beside it";
                SgxIdentity::Signer {
                    mr_signer,
                    isv_prod_id: self
                        .isv_prod_id
                        .ok_or_else(|| missing(start, "measurement.isv_prod_id", remedy))?,
                    minimum_isv_svn: self
                        .minimum_isv_svn
                        .ok_or_else(|| missing(start, "measurement.minimum_isv_svn", remedy))?,
                }
            }
        };
        no_foreign_key(start, "mr_enclave or mr_signer", &foreign)?;
        Ok(Measurement::Sgx(Box::new(SgxMeasurement {
            name,
            identity,
            config_id: optional_hex("measurement.config_id", self.config_id.as_ref())?
                .unwrap_or([0; 64]),
            attributes: optional_hex("measurement.attributes", self.attributes.as_ref())?,
        })))
    }
}

const RTMR_KEYS: [(&str, &str); 4] = [
    (
        "measurement.rtmr0",
        "give its value, or list 0 in dangerous_any_rtmr",
    ),
    (
        "measurement.rtmr1",
        "give its value, or list 1 in dangerous_any_rtmr",
    ),
    (
        "measurement.rtmr2",
        "give its value, or list 2 in dangerous_any_rtmr",
    ),
    (
        "measurement.rtmr3",
        "give its value, or list 3 in dangerous_any_rtmr",
    ),
];

impl RawModel {
    fn check(self) -> Result<ModelPolicy, Fault> {
        let (key, start) = ("model.digests", self.digests.span().start);
        let list = self.digests.into_inner();
        if list.is_empty() || list.len() > MAX_ENTRIES {
            return Err(count(start, key, list.len(), "1 to 256"));
        }
        let digests = check_digests(key, &list)?;
        let adapters = match self.adapters {
            None => BTreeSet::new(),
            Some(list) => {
                let (key, start) = ("model.adapters", list.span().start);
                let list = list.into_inner();
                if list.len() > MAX_ENTRIES {
                    return Err(count(start, key, list.len(), "at most 256"));
                }
                check_digests(key, &list)?
            }
        };
        Ok(ModelPolicy {
            digests,
            minimum_version: self.minimum_version,
            adapters,
        })
    }
}

/// Digests, each once.
fn check_digests(key: &'static str, list: &[Spanned<String>]) -> Result<BTreeSet<[u8; 32]>, Fault> {
    let mut digests = BTreeSet::new();
    for digest in list {
        if !digests.insert(hex_array(key, digest)?) {
            return Err(repeated(key, digest));
        }
    }
    Ok(digests)
}

impl RawService {
    fn check(self) -> Result<ServicePolicy, Fault> {
        let age = *self.maximum_evidence_age_seconds.get_ref();
        if !(1..=MAX_EVIDENCE_AGE).contains(&age) {
            return Err(value(
                "service.maximum_evidence_age_seconds",
                &self.maximum_evidence_age_seconds,
                "1 to 86400",
            ));
        }
        Ok(ServicePolicy {
            issuer: hex_array("service.issuer", &self.issuer)?,
            name: plain_name("service.name", &self.name)?,
            maximum_evidence_age_seconds: age,
        })
    }
}

fn reference(
    start: usize,
    key: &'static str,
    given: Option<&Spanned<String>>,
    any_key: &'static str,
    any: bool,
    remedy: &'static str,
) -> Result<Reference, Fault> {
    match (given, any) {
        (Some(given), false) => Ok(Reference::Exactly(hex_array(key, given)?)),
        (None, true) => Ok(Reference::Any),
        (Some(given), true) => Err(conflict(given.span().start, key, any_key)),
        (None, false) => Err(missing(start, key, remedy)),
    }
}

fn optional_hex<const N: usize>(
    key: &'static str,
    given: Option<&Spanned<String>>,
) -> Result<Option<[u8; N]>, Fault> {
    given.map(|given| hex_array(key, given)).transpose()
}

fn hex_array<const N: usize>(key: &'static str, given: &Spanned<String>) -> Result<[u8; N], Fault> {
    let mut bytes = [0; N];
    hex::decode_to_slice(given.get_ref(), &mut bytes).map_err(|_| {
        let expected = match N {
            8 => "16 hexadecimal digits",
            16 => "32 hexadecimal digits",
            32 => "64 hexadecimal digits",
            48 => "96 hexadecimal digits",
            _ => "128 hexadecimal digits",
        };
        value(key, given, expected)
    })?;
    Ok(bytes)
}

fn plain_name(key: &'static str, given: &Spanned<String>) -> Result<String, Fault> {
    let name = given.get_ref();
    let plain = !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control);
    if !plain {
        return Err(value(key, given, "1 to 128 printable characters"));
    }
    Ok(name.clone())
}

fn no_foreign_key(
    start: usize,
    key: &'static str,
    foreign: &[(&'static str, bool)],
) -> Result<(), Fault> {
    match foreign.iter().find(|(_, present)| *present) {
        Some((other, _)) => Err(conflict(start, key, other)),
        None => Ok(()),
    }
}

fn value<T: ToString>(key: &'static str, given: &Spanned<T>, expected: &'static str) -> Fault {
    // A value can be as long as the file; the message need not.
    let found = given.get_ref().to_string().chars().take(200).collect();
    (
        Some(given.span().start),
        PolicyFault::Value {
            key,
            found,
            expected,
        },
    )
}

fn repeated<T: ToString>(key: &'static str, given: &Spanned<T>) -> Fault {
    let value = given.get_ref().to_string();
    (
        Some(given.span().start),
        PolicyFault::Repeated { key, value },
    )
}

fn missing(start: usize, key: &'static str, remedy: &'static str) -> Fault {
    (Some(start), PolicyFault::Missing { key, remedy })
}

fn conflict(start: usize, key: &'static str, other: &'static str) -> Fault {
    (Some(start), PolicyFault::Conflict { key, other })
}

fn count(start: usize, key: &'static str, count: usize, expected: &'static str) -> Fault {
    (
        Some(start),
        PolicyFault::Count {
            key,
            count,
            expected,
        },
    )
}
