//! Who may ask, and how much: known inside the attested channel only, before the API sees a request.
//!
//! | module | holds |
//! |---|---|
//! | `bucket` | token buckets, with time as an argument |
//! | `keys` | the API keys of the grant, and what each has used |
//!
//! The provider lists API keys in the key grant, as hashes; the host can add none. [`Access`] compares the key of a
//! request with all of them, keeps the limits of its holder, and tells what follows who asks: [`Caller`] for what is
//! bound to a person, [`Meter`] for what is counted in tokens.

mod bucket;
mod keys;

use std::hash::{Hash, Hasher};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use axum::response::IntoResponse;
use casemate_engine::User;
use casemate_release::api_key;
use futures::StreamExt;
use subtle::{Choice, ConstantTimeEq};
use tower::ServiceExt;
use tracing::{info, warn};

use crate::api::ApiError;
use crate::metrics::{Denied, Metrics};
use bucket::{Period, Shortage};
use keys::{Key, Permit, Reached, Table};

/// Time since any fixed moment.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// A clock that nobody can set.
#[must_use]
pub fn monotonic() -> Clock {
    let start = Instant::now();
    Arc::new(move || start.elapsed())
}

/// Who made an inner request, as a request extension: the holder of an API key of the grant, or anybody, where the grant
/// is open. Callers are equal who have the same key: its name may pass to another.
#[derive(Debug, Clone)]
pub struct Caller(Option<Holder>);

#[derive(Debug, Clone)]
struct Holder {
    name: Arc<str>,
    /// SHA-256 of the API key.
    key: [u8; 32],
}

impl PartialEq for Caller {
    fn eq(&self, other: &Self) -> bool {
        let key = |caller: &Self| caller.0.as_ref().map(|holder| holder.key);
        key(self) == key(other)
    }
}

impl Eq for Caller {}

impl Hash for Caller {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_ref().map(|holder| holder.key).hash(state);
    }
}

impl Caller {
    /// Somebody who needed no key.
    #[must_use]
    pub fn anonymous() -> Self {
        Self(None)
    }

    /// The holder of the API key with this SHA-256, which the provider named so.
    #[must_use]
    pub fn holder(name: impl Into<Arc<str>>, key: [u8; 32]) -> Self {
        let name = name.into();
        Self(Some(Holder { name, key }))
    }

    /// Whose requests take turns as one and may share what was computed: the holder of a key. Who needed none cannot be
    /// told from anybody else, and so shares with nobody.
    #[must_use]
    pub fn user(&self) -> Option<User> {
        self.0.as_ref().map(|holder| User::new(holder.key))
    }

    /// Whether its key is one of these.
    #[must_use]
    pub fn has_one_of(&self, keys: &[api_key::ApiKey]) -> bool {
        let Some(holder) = &self.0 else {
            return false;
        };
        // Every entry is compared, whichever fits.
        let found = keys.iter().fold(Choice::from(0), |found, key| {
            found | key.hash.ct_eq(&holder.key)
        });
        found.into()
    }

    /// The name of the API key, as the provider wrote it into the grant.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0.as_ref().map(|holder| &*holder.name)
    }
}

/// Counts the tokens of one request against its caller's limit, as a request extension.
#[derive(Clone, Default)]
pub struct Meter(Option<Arc<Metered>>);

struct Metered {
    key: Arc<Key>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl Meter {
    /// Takes the tokens of all prompts of a request, before any of it is computed. They come back unless it is.
    ///
    /// # Errors
    /// The answer to a caller who has used up its tokens: what was generated beyond the limit counts too.
    pub(crate) fn take_prompt(&self, tokens: usize) -> Result<Taken, ApiError> {
        let Some(metered) = &self.0 else {
            return Ok(Taken(None));
        };
        let wanted = u32::try_from(tokens).unwrap_or(u32::MAX);
        let now = (metered.clock)();
        let taken = metered.key.take_tokens(now, wanted).map_err(|reached| {
            metered.metrics.denied(Denied::Tokens);
            let Reached { limit, period, shortage } = reached;
            let per = per(period);
            let message = match shortage {
                Shortage::Until(_) => format!(
                    "Rate limit reached on tokens per {per}: limit {limit}, requested {tokens} for the prompt"
                ),
                Shortage::Never => format!(
                    "Request too large: its prompt has {tokens} tokens, and the limit is {limit} per {per}"
                ),
            };
            refusal("tokens", period, message, retry_after(shortage))
        });
        taken.map(|()| Taken(Some((Arc::clone(metered), now, wanted))))
    }

    /// Counts one token that was generated.
    pub(crate) fn generated(&self) {
        if let Some(metered) = &self.0 {
            metered.key.charge_tokens((metered.clock)(), 1);
        }
    }
}

/// Tokens that were taken for prompts, from whom and when. Dropped, they are given back: the request is refused after all,
/// for lack of a place for instance, and nothing is computed.
#[must_use = "dropped, the tokens are given back"]
pub(crate) struct Taken(Option<(Arc<Metered>, Duration, u32)>);

impl Taken {
    /// The prompts are computed.
    pub(crate) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some((metered, taken, tokens)) = self.0.take() {
            let now = (metered.clock)();
            metered.key.give_tokens_back(taken, now, tokens);
        }
    }
}

fn per(period: Period) -> &'static str {
    match period {
        Period::Minute => "minute",
        Period::Day => "day",
    }
}

/// The answer to who reached a limit on `kind`: that of a minute is one on load, that of a day is a quota.
fn refusal(
    kind: &'static str,
    period: Period,
    message: String,
    retry_after: Option<u32>,
) -> ApiError {
    match period {
        Period::Minute => ApiError::rate_limited(kind, message, retry_after),
        Period::Day => ApiError::quota_exceeded(message, retry_after),
    }
}

fn retry_after(shortage: Shortage) -> Option<u32> {
    match shortage {
        Shortage::Never => None,
        Shortage::Until(wait) => Some(seconds(wait).max(1)),
    }
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(1000)).unwrap_or(u32::MAX)
}

/// Logs who may ask, at the start. The log is the host's: it learns how many keys there are, and not whose.
pub fn announce(access: &api_key::Access) {
    log(access, "");
}

fn log(access: &api_key::Access, changed: &str) {
    match access {
        api_key::Access::Open => {
            warn!(
                "access: {access}{changed}, no API key is asked for; so the provider's grant says"
            );
        }
        api_key::Access::Keyed(_) => info!("access: {access}{changed}"),
    }
}

/// The access that the grant in force allows.
pub struct Access {
    table: RwLock<Arc<Table>>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl Access {
    /// Asks for what a grant says: one of its keys, or nothing.
    #[must_use]
    pub fn new(access: &api_key::Access, clock: Clock, metrics: Arc<Metrics>) -> Self {
        let table = Table::new(access, None, clock());
        Self {
            table: RwLock::new(Arc::new(table)),
            clock,
            metrics,
        }
    }

    /// Takes what a newer grant says, and logs that it is something else than before if it is. Keys that stay, with the limits that they had, keep what they have used.
    /// Requests that are being answered are not interrupted.
    pub fn replace(&self, access: &api_key::Access) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let newer = Table::new(access, Some(&table), (self.clock)());
        if !newer.says_the_same_as(&table) {
            log(access, ", changed");
        }
        *table = Arc::new(newer);
    }

    /// Lets nobody in whom a newer grant does not let in, and logs that somebody is not. Whom it adds, and other limits, wait
    /// for [`Access::replace`].
    pub fn withdraw(&self, access: &api_key::Access) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let narrower = table.without(access, (self.clock)());
        if !narrower.says_the_same_as(&table) {
            match &narrower {
                Table::Open => {}
                Table::Keyed(keys) if keys.len() == 1 => info!("access: 1 API key, changed"),
                Table::Keyed(keys) => info!("access: {} API keys, changed", keys.len()),
            }
        }
        *table = Arc::new(narrower);
    }

    fn table(&self) -> Arc<Table> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&table)
    }

    /// Lets a request of a known caller within its limits through to `next`, and answers any other.
    pub async fn handle(&self, mut request: Request<Body>, next: Router) -> Response<Body> {
        let open = self.metrics.open_request();
        let key = match self.key(request.headers()) {
            Ok(key) => key,
            Err(error) => return error.into_response(),
        };
        // Nothing behind this door has use for it.
        request.headers_mut().remove(header::AUTHORIZATION);
        let caller = match &key {
            None => Caller::anonymous(),
            Some(key) => Caller::holder(Arc::clone(&key.name), key.hash),
        };
        request.extensions_mut().insert(caller);
        // Asking what there is, is free.
        let admitted = match key.filter(|_| request.method() == Method::POST) {
            None => None,
            Some(key) => match self.admit(&key) {
                Ok(permit) => {
                    let metered = Metered {
                        key: Arc::clone(&key),
                        clock: Arc::clone(&self.clock),
                        metrics: Arc::clone(&self.metrics),
                    };
                    request
                        .extensions_mut()
                        .insert(Meter(Some(Arc::new(metered))));
                    Some((key, permit))
                }
                Err(error) => {
                    let mut response = error.into_response();
                    self.describe(&key, response.headers_mut());
                    return response;
                }
            },
        };
        let mut response = match next.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let permit = admitted.map(|(key, permit)| {
            self.describe(&key, response.headers_mut());
            permit
        });
        // A request is open until its answer is complete or nobody wants the rest.
        let held = (open, permit);
        response.map(|body| {
            Body::from_stream(body.into_data_stream().map(move |piece| {
                let _held = &held;
                piece
            }))
        })
    }

    /// Refuses who has no key of the grant, by the fields of a request of which the rest need not be there. Whoever passes
    /// is asked again when it is: another grant may be in force by then.
    ///
    /// # Errors
    /// The answer.
    pub fn refuse_strangers(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        self.key(headers).map(|_| ())
    }

    fn key(&self, headers: &HeaderMap) -> Result<Option<Arc<Key>>, ApiError> {
        let key = self.authenticate(headers);
        if key.is_err() {
            self.metrics.denied(Denied::Key);
        }
        key
    }

    fn authenticate(&self, headers: &HeaderMap) -> Result<Option<Arc<Key>>, ApiError> {
        let table = self.table();
        let keys = match &*table {
            Table::Open => return Ok(None),
            Table::Keyed(keys) => keys,
        };
        let presented = bearer(headers).ok_or_else(|| {
            ApiError::invalid_api_key(
                "You didn't provide an API key. This service asks for one: Authorization: Bearer cm-…",
            )
        })?;
        match keys::find(keys, presented) {
            Some(key) => Ok(Some(key)),
            None => Err(ApiError::invalid_api_key(
                "Incorrect API key provided. Ask the provider of this service for one",
            )),
        }
    }

    fn admit(&self, key: &Arc<Key>) -> Result<Permit, ApiError> {
        let permit = key.begin().map_err(|limit| {
            self.metrics.denied(Denied::Concurrency);
            let message = format!("Rate limit reached on requests at the same time: limit {limit}");
            ApiError::rate_limited("requests", message, Some(1))
        })?;
        key.take_request((self.clock)()).map_err(|reached| {
            self.metrics.denied(Denied::Requests);
            let Reached { limit, period, .. } = reached;
            let message = format!(
                "Rate limit reached on requests per {}: limit {limit}",
                per(period)
            );
            refusal("requests", period, message, retry_after(reached.shortage))
        })?;
        Ok(permit)
    }

    /// Says what is left, in the fields that clients of OpenAI's service know.
    fn describe(&self, key: &Key, headers: &mut HeaderMap) {
        let now = (self.clock)();
        for (names, state) in [
            (REQUESTS, key.requests(Period::Minute, now)),
            (TOKENS, key.tokens(Period::Minute, now)),
            (REQUESTS_OF_THE_DAY, key.requests(Period::Day, now)),
            (TOKENS_OF_THE_DAY, key.tokens(Period::Day, now)),
        ] {
            let Some((limit, left, full_in)) = state else {
                continue;
            };
            let [limit_name, left_name, full_name] = names;
            headers.insert(limit_name, HeaderValue::from(limit));
            headers.insert(left_name, HeaderValue::from(left));
            let full = format!("{}s", seconds(full_in));
            headers.insert(
                full_name,
                HeaderValue::from_str(&full).expect("digits are a field's value"),
            );
        }
    }
}

const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

const REQUESTS_OF_THE_DAY: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests-day"),
    HeaderName::from_static("x-ratelimit-remaining-requests-day"),
    HeaderName::from_static("x-ratelimit-reset-requests-day"),
];
const TOKENS_OF_THE_DAY: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens-day"),
    HeaderName::from_static("x-ratelimit-remaining-tokens-day"),
    HeaderName::from_static("x-ratelimit-reset-tokens-day"),
];

/// The fields in which a caller's limits are told.
pub(crate) fn limit_fields() -> impl Iterator<Item = HeaderName> {
    let of_the_day = REQUESTS_OF_THE_DAY.into_iter().chain(TOKENS_OF_THE_DAY);
    REQUESTS.into_iter().chain(TOKENS).chain(of_the_day)
}

/// The key of `Authorization: Bearer <key>`, if there is exactly one such field.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut fields = headers.get_all(header::AUTHORIZATION).iter();
    let field = fields.next()?.as_bytes();
    if fields.next().is_some() {
        return None;
    }
    let (scheme, key) = field.split_at_checked("Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| key.trim_ascii())
}
