//! Why an enclave did not come to serve, for machines: one line of JSON behind the error that it ends with. The form is
//! that of the broker's denials, so that `casemate explain` reads both. Faults of the system, such as a port in use, are
//! no denials.

use casemate_container::{Malformed, NotAuthentic, OpenError};
use casemate_engine::LoadError;
use casemate_release::rcar::{DenialInformation, ErrorInformation};
use casemate_release::{Refused, ReleaseError, Unverified};
use serde::Serialize;

use crate::provision::ProvisionError;
use crate::serving::ServingError;

/// A denial and whose it is.
#[derive(Debug, Serialize)]
pub struct StartDenial {
    /// `broker` or `enclave`.
    pub by: &'static str,
    /// What was denied.
    #[serde(flatten)]
    pub denial: DenialInformation,
}

impl StartDenial {
    /// The denial among an error's causes, if it is one.
    pub fn of(error: &anyhow::Error) -> Option<StartDenial> {
        error.chain().find_map(|cause| {
            if let Some(error) = cause.downcast_ref::<OpenError>() {
                return opening(error);
            }
            if let Some(error) = cause.downcast_ref::<ProvisionError>() {
                return provisioning(error);
            }
            if let Some(ServingError::Provision(error)) = cause.downcast_ref() {
                return provisioning(error);
            }
            if let Some(error) = cause.downcast_ref::<LoadError>() {
                return loading(error);
            }
            releasing(cause.downcast_ref::<ReleaseError>()?)
        })
    }

    /// As one line of a log.
    pub fn line(&self) -> String {
        let json = serde_json::to_string(self).expect("strings always have a JSON form");
        format!("denial: {json}")
    }
}

fn enclave(class: &str, claim: &str, found: String, expected: &str, remedy: &str) -> StartDenial {
    StartDenial {
        by: "enclave",
        denial: DenialInformation {
            class: class.into(),
            claim: claim.into(),
            found,
            expected: expected.into(),
            remedy: remedy.into(),
        },
    }
}

fn opening(error: &OpenError) -> Option<StartDenial> {
    let (class, found) = match error {
        OpenError::Malformed(Malformed::Manifest(e)) => ("malformed", e.to_string()),
        OpenError::Malformed(e) => ("malformed", e.to_string()),
        OpenError::NotAuthentic(e) => ("not_authentic", e.to_string()),
        OpenError::Memory { .. } | OpenError::Io { .. } => return None,
    };
    let expected = match error {
        OpenError::NotAuthentic(NotAuthentic::WrongKey) => "a file sealed under the granted key",
        OpenError::NotAuthentic(NotAuthentic::WrongSigner { .. }) => {
            "the provider named in the configuration"
        }
        _ => "the model as its provider sealed it",
    };
    let remedy = "copy the sealed model from the provider again; `casemate check` examines a file";
    Some(enclave(class, error.code(), found, expected, remedy))
}

fn loading(error: &LoadError) -> Option<StartDenial> {
    let found = error.to_string();
    Some(match error {
        LoadError::OtherBase { model, .. } => enclave(
            "refused",
            "adapter.base",
            found,
            &format!("adapters to the model {model}"),
            "take the adapter that its provider sealed for this model, or serve the model that it is for",
        ),
        LoadError::Adapter(_) => enclave(
            "malformed",
            "adapter.tensors",
            found,
            "tensors in the shapes of the model",
            "have the provider seal the adapter again, with the sealed model as --base",
        ),
        LoadError::AdapterTwice { .. } => enclave(
            "refused",
            "adapter.twice",
            found,
            "each adapter under one name",
            "take one of the two out of the configuration",
        ),
        _ => return None,
    })
}

fn provisioning(error: &ProvisionError) -> Option<StartDenial> {
    match error {
        ProvisionError::Refused { text, .. } => {
            let said: ErrorInformation = serde_json::from_str(text).ok()?;
            Some(StartDenial {
                by: "broker",
                denial: *said.denial?,
            })
        }
        ProvisionError::Release(error) => releasing(error),
        ProvisionError::OtherCredential => Some(enclave(
            "refused",
            "credential.binding",
            error.to_string(),
            "a credential for this enclave's keyset and service",
            "look for who answers in the broker's place between here and the broker",
        )),
        ProvisionError::OtherAdapter { expected, .. } => Some(enclave(
            "refused",
            "grant.adapter",
            error.to_string(),
            &format!("a grant for the adapter {expected}"),
            "compare `digest` in the configuration with what `casemate seal` printed, and both with what the broker \
             stores under this resource; if they agree, somebody between here and the broker exchanges its answers",
        )),
        ProvisionError::ConfigurationNotMeasured => Some(enclave(
            "refused",
            "configuration.measured",
            error.to_string(),
            "evidence over the configuration that this process read",
            "leave the configuration file alone while the enclave starts, and name it in full",
        )),
        ProvisionError::Unreachable { .. }
        | ProvisionError::TooLarge(_)
        | ProvisionError::Tee(_)
        | ProvisionError::Interrupted
        | ProvisionError::NoPolicyVersion => None,
    }
}

fn releasing(error: &ReleaseError) -> Option<StartDenial> {
    let found = error.to_string();
    Some(match error {
        ReleaseError::Unverified(Unverified::Grant) => enclave(
            "not_authentic",
            "grant.signature",
            found,
            "a key grant signed by the provider named in the configuration",
            "this broker does not speak for the provider: check its address, and `provider` in the configuration",
        ),
        ReleaseError::Unverified(Unverified::Credential) => enclave(
            "not_authentic",
            "credential.signature",
            found,
            "a credential signed by the issuer named in the configuration",
            "this broker is not the issuer: check its address, and `issuer` in the configuration",
        ),
        ReleaseError::Unverified(Unverified::Jwe) => enclave(
            "not_authentic",
            "grant.encryption",
            found,
            "a key grant encrypted to this enclave",
            "look for who answers in the broker's place between here and the broker",
        ),
        ReleaseError::Refused(Refused::OtherModel { .. }) => enclave(
            "refused",
            "grant.model",
            found,
            "the model that the key was granted for",
            "put the model that the provider granted in its place, or have this one granted",
        ),
        ReleaseError::Refused(Refused::OldVersion { .. }) => enclave(
            "refused",
            "grant.version",
            found,
            "a version that the grant allows",
            "put the newer model of the provider in its place",
        ),
        ReleaseError::Refused(Refused::Expired { .. } | Refused::NotYetValid { .. }) => enclave(
            "refused",
            "credential.validity",
            found,
            "a credential that is valid now",
            "compare the clocks of broker and enclave",
        ),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    fn denial(error: anyhow::Error) -> Option<(&'static str, String)> {
        StartDenial::of(&error).map(|denial| (denial.by, denial.denial.claim))
    }

    #[test]
    fn finds_the_denial_below_its_context() {
        let chunk = OpenError::from(NotAuthentic::Chunk { index: 3 });
        let error = Err::<(), _>(chunk).context("cannot open the model").err();
        assert_eq!(denial(error.unwrap()), Some(("enclave", "chunk".into())));
        let grant = ReleaseError::from(Unverified::Grant);
        let error = anyhow::Error::from(ProvisionError::Release(grant));
        assert_eq!(denial(error), Some(("enclave", "grant.signature".into())));
        let credential = ReleaseError::from(Unverified::Credential);
        let error = ServingError::Provision(ProvisionError::Release(credential));
        let expected = Some(("enclave", "credential.signature".into()));
        assert_eq!(denial(error.into()), expected);
    }

    #[test]
    fn passes_on_what_the_broker_said() {
        let refused = |text: &str| ProvisionError::Refused {
            what: "evidence",
            status: 401,
            text: text.into(),
        };
        let text = r#"{"type":"evidence_denied","detail":"","denial":
            {"class":"refused","claim":"debug","found":"a","expected":"b","remedy":"c"}}"#;
        let found = StartDenial::of(&refused(text).into()).unwrap();
        assert_eq!((found.by, found.denial.claim.as_str()), ("broker", "debug"));
        let line = found.line();
        let json: serde_json::Value =
            serde_json::from_str(line.strip_prefix("denial: ").unwrap()).unwrap();
        assert_eq!(
            (&json["by"], &json["class"]),
            (&"broker".into(), &"refused".into())
        );
        assert!(StartDenial::of(&refused("<html>").into()).is_none());
    }

    #[test]
    fn faults_of_the_system_are_no_denials() {
        let io = OpenError::Io {
            path: "x".into(),
            error: std::io::ErrorKind::NotFound.into(),
        };
        assert_eq!(denial(io.into()), None);
        assert_eq!(denial(anyhow::anyhow!("cannot listen")), None);
    }
}
