//! Attacks with evidence, on the broker. The attacker speaks the broker's protocol himself, with quotes of a TEE that he
//! can bend as no real one can be: the fake TEE's keys, read from its state.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use casemate_attest::measure::Measurement;
use casemate_attest::{Evidence, TeeKind};
use casemate_release::client::{Challenged, Exchange};
use casemate_release::random::SystemRandom;
use casemate_release::rcar::{ATTEST_PATH, AUTH_PATH};
use serde_json::Value;

use super::wire::{Message, exchange};
use super::{By, Ground, Miss, Refusal, Verdict};
use crate::fake_tee::{FakeTee, Revoked, Sample};

const DAY: i64 = 24 * 3600;

pub(super) fn debug_mode(ground: &mut Ground) -> Result<Refusal, Miss> {
    bent(ground, |sample| sample.body.td_attributes[0] |= 1)
}

pub(super) fn expired_collateral(ground: &mut Ground) -> Result<Refusal, Miss> {
    bent(ground, |sample| {
        sample.endorsements.shift_seconds = -31 * DAY
    })
}

pub(super) fn revoked_platform(ground: &mut Ground) -> Result<Refusal, Miss> {
    bent(ground, |sample| {
        sample.endorsements.revoked.push(Revoked::Pck)
    })
}

pub(super) fn revoked_signer(ground: &mut Ground) -> Result<Refusal, Miss> {
    bent(ground, |sample| {
        sample.endorsements.revoked.push(Revoked::TcbSigning)
    })
}

/// A session in which everything is right is recorded, and its attestation sent to a second session.
pub(super) fn replayed_to_broker(ground: &mut Ground) -> Result<Refusal, Miss> {
    let first = begin(ground)?;
    let evidence = quote(ground, &first, |_| ())?;
    let recorded = first.attestation(&evidence)?;
    let accepted = send(ground, &first, &recorded)?;
    if accepted.status() != 200 {
        return Err(Miss::Broken(format!(
            "not even at first: {}",
            accepted.text()
        )));
    }
    let second = begin(ground)?;
    refused(send(ground, &second, &recorded)?)
}

/// Attests with evidence that is right but for one thing.
fn bent(ground: &Ground, bend: impl FnOnce(&mut Sample)) -> Result<Refusal, Miss> {
    let session = begin(ground)?;
    let evidence = quote(ground, &session, bend)?;
    let attestation = session.attestation(&evidence)?;
    refused(send(ground, &session, &attestation)?)
}

/// Takes a challenge of the broker.
fn begin(ground: &Ground) -> Result<Challenged, Miss> {
    let attempt = Exchange::new(TeeKind::Tdx, &SystemRandom)?;
    let request = Message::post(AUTH_PATH, "application/json", &attempt.request());
    let answer = exchange(&ground.deployment.broker()?.url, &request)?;
    Ok(attempt.challenge(&answer.body, answer.fields("set-cookie"))?)
}

/// A quote over a session's nonce and key, with the measurement that the broker's policy names.
fn quote(
    ground: &Ground,
    session: &Challenged,
    bend: impl FnOnce(&mut Sample),
) -> Result<Evidence, Miss> {
    // A running fake TEE keeps its directory to itself; who can read the keys needs no more.
    let state = ground.path("fake-tee");
    fs::create_dir_all(&state)?;
    for entry in fs::read_dir(ground.deployment.work_dir().join("fake-tee"))? {
        let entry = entry?;
        fs::copy(entry.path(), state.join(entry.file_name()))?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let tee = FakeTee::open(&state, now)?;
    let measurement = measurement(&ground.deployment.measurement()?.fields)?;
    let mut sample = Sample::new(&measurement, &session.report_data());
    bend(&mut sample);
    Ok(tee.quote_with(&sample, now)?)
}

fn measurement(fields: &Value) -> Result<Measurement, Miss> {
    let register = |name: &str| {
        let mut register = [0; 48];
        let text = fields[name].as_str().unwrap_or("");
        hex::decode_to_slice(text, &mut register)
            .map_err(|error| Miss::Broken(format!("{name} of {fields}: {error}")))?;
        Ok::<_, Miss>(register)
    };
    Ok(Measurement {
        mr_td: register("mr_td")?,
        mr_config_id: register("mr_config_id")?,
        rtmr: [
            register("rtmr0")?,
            register("rtmr1")?,
            register("rtmr2")?,
            register("rtmr3")?,
        ],
    })
}

fn send(ground: &Ground, session: &Challenged, attestation: &[u8]) -> Result<Message, Miss> {
    let request = Message::post(ATTEST_PATH, "application/json", attestation);
    let request = request.with("cookie", &session.cookie());
    Ok(exchange(&ground.deployment.broker()?.url, &request)?)
}

fn refused(answer: Message) -> Result<Refusal, Miss> {
    if answer.status() == 200 {
        return Err(Miss::Accepted("the broker accepts the evidence".into()));
    }
    let said: Value = serde_json::from_slice(&answer.body)?;
    let verdict = Verdict::Http(answer.status());
    Refusal::read(By::Broker, &said["denial"], verdict, answer.text())
}
