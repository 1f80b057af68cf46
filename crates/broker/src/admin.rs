//! Administration: HTTP with JSON on a Unix socket that only the broker's user can open, and its client.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{Method, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use casemate_release::ReleaseError;
use casemate_release::rcar::{ErrorInformation, ResourcePath};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use zeroize::Zeroizing;

use crate::broker::{Broker, Rejection};
use crate::log::{Access, Anchor, Head};
use crate::store::{NewResource, StoreError};

const MAX_BODY_BYTES: usize = 512 * 1024;
const MAX_REPLY_BYTES: usize = 64 * 1024 * 1024;
const MAX_ENTRIES: u64 = 10_000;
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

/// Body of `PUT /policy`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SetPolicy {
    toml: String,
    rollback: Option<String>,
}

/// Body of `PUT /resource/…`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PutResource {
    resource: Sent,
    service: Option<String>,
}

/// A [`NewResource`], in base64.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Sent {
    Grant {
        envelope: String,
        rollback: Option<String>,
        open: bool,
    },
    Opaque {
        bytes: String,
    },
}

impl Drop for Sent {
    fn drop(&mut self) {
        let (Sent::Grant {
            envelope: secret, ..
        }
        | Sent::Opaque { bytes: secret }) = self;
        zeroize::Zeroize::zeroize(secret);
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogRange {
    from: u64,
    limit: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogAnchors {
    /// Anchors with commas in between.
    anchors: Option<String>,
}

/// All administration routes.
pub fn router(broker: Arc<Broker>) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/policy", get(show_policy).put(set_policy))
        .route("/resource", get(list_resources))
        .route(
            "/resource/{repository}/{kind}/{tag}",
            put(put_resource).delete(delete_resource),
        )
        .route("/log", get(show_log))
        .route("/log/verify", get(verify_log))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(broker)
}

/// Binds the socket with mode 0600. A socket that nobody serves any more is replaced.
///
/// # Errors
/// `AddrInUse` when another process serves it or the path is not a socket.
pub async fn bind(path: &FilePath) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        let in_use = || io::Error::from(io::ErrorKind::AddrInUse);
        if !metadata.file_type().is_socket() || UnixStream::connect(path).await.is_ok() {
            return Err(in_use());
        }
        std::fs::remove_file(path)?;
    }
    // The mode must be right from the first moment on, not only after a chmod.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

type Broken = (StatusCode, Json<ErrorInformation>);

fn broken(rejection: Rejection) -> Broken {
    let (status, kind) = match &rejection {
        Rejection::NoResource(_) => (StatusCode::NOT_FOUND, "resource_not_found"),
        Rejection::Store(StoreError::Log(_)) => (StatusCode::CONFLICT, "log"),
        Rejection::Store(
            StoreError::PolicyGoesBack { .. }
            | StoreError::PolicyChanged(_)
            | StoreError::PolicyVersion(_)
            | StoreError::ModelGoesBack { .. },
        ) => (StatusCode::CONFLICT, "version"),
        Rejection::Store(
            StoreError::Rollback(_) | StoreError::RollbackUsed | StoreError::RollbackNotNeeded,
        )
        | Rejection::Rollback(ReleaseError::Refused(_))
        | Rejection::NoProvider => (StatusCode::CONFLICT, "rollback"),
        Rejection::Rollback(ReleaseError::Unverified(_))
        | Rejection::Store(StoreError::Grant(ReleaseError::Unverified(_))) => {
            (StatusCode::BAD_REQUEST, "not_authentic")
        }
        Rejection::OtherProvider { .. } => (StatusCode::CONFLICT, "provider"),
        Rejection::Store(StoreError::OpensAccess(_) | StoreError::GrantNotOpen) => {
            (StatusCode::CONFLICT, "access")
        }
        Rejection::NoPolicy => (StatusCode::NOT_FOUND, "no_policy"),
        Rejection::Store(
            StoreError::Grant(_) | StoreError::GrantAsOpaque | StoreError::Limit(_),
        ) => (StatusCode::BAD_REQUEST, "malformed"),
        Rejection::Store(_) => (StatusCode::INTERNAL_SERVER_ERROR, "storage"),
        _ => (StatusCode::BAD_REQUEST, "malformed"),
    };
    let detail = rejection.to_string();
    (
        status,
        Json(ErrorInformation {
            kind: kind.into(),
            detail,
            denial: None,
        }),
    )
}

fn malformed(detail: &str) -> Broken {
    let information = ErrorInformation {
        kind: "malformed".into(),
        detail: detail.into(),
        denial: None,
    };
    (StatusCode::BAD_REQUEST, Json(information))
}

async fn work<T: Send + 'static>(
    broker: Arc<Broker>,
    decide: impl FnOnce(&Broker) -> Result<T, Rejection> + Send + 'static,
) -> Result<T, Broken> {
    match tokio::task::spawn_blocking(move || decide(&broker)).await {
        Ok(outcome) => outcome.map_err(broken),
        Err(_) => Err(malformed("the broker failed on this request")),
    }
}

async fn status(State(broker): State<Arc<Broker>>) -> Result<Json<Value>, Broken> {
    work(broker, |broker| {
        let policy = broker.policy().map(|policy| {
            json!({
                "version": policy.version(),
                "digest": hex::encode(policy.digest()),
                "development_root": policy.dangerous_development_root().map(hex::encode),
            })
        });
        let (pending, attested) = broker.session_counts();
        Ok(Json(json!({
            "issuer": broker.issuer().to_string(),
            "token_key": broker.token_jwk(),
            "policy": policy,
            "resources": broker.resources()?.len(),
            "sessions": { "pending": pending, "attested": attested },
            "log": broker.head()?,
        })))
    })
    .await
}

async fn show_policy(State(broker): State<Arc<Broker>>) -> Result<Json<Value>, Broken> {
    let policy = work(broker, Broker::policy_text).await?;
    let (version, toml) = policy.ok_or_else(|| broken(Rejection::NoPolicy))?;
    Ok(Json(json!({ "version": version, "toml": toml })))
}

async fn set_policy(
    State(broker): State<Arc<Broker>>,
    Json(body): Json<SetPolicy>,
) -> Result<Json<Value>, Broken> {
    let rollback = rollback(body.rollback.as_deref())?;
    let set = move |broker: &Broker| broker.set_policy(&body.toml, rollback.as_deref());
    let policy = work(broker, set).await?;
    if let Some(root) = policy.dangerous_development_root() {
        warn_development(root);
    }
    Ok(Json(json!({
        "version": policy.version(),
        "digest": hex::encode(policy.digest()),
        "development_root": policy.dangerous_development_root().map(hex::encode),
    })))
}

/// Says aloud that evidence of a development root is accepted.
pub fn warn_development(root: &[u8; 32]) {
    tracing::warn!(
        root = hex::encode(root),
        "the policy accepts a DEVELOPMENT root: what it vouches for is not a TEE"
    );
}

async fn list_resources(State(broker): State<Arc<Broker>>) -> Result<Json<Value>, Broken> {
    let resources = work(broker, Broker::resources).await?;
    Ok(Json(json!({ "resources": resources })))
}

async fn put_resource(
    State(broker): State<Arc<Broker>>,
    Path(parts): Path<(String, String, String)>,
    Json(body): Json<PutResource>,
) -> Result<Response, Broken> {
    let path = resource_path(parts)?;
    let (secret, rollback, open) = match &body.resource {
        Sent::Grant {
            envelope,
            rollback,
            open,
        } => (envelope, rollback.as_deref(), Some(*open)),
        Sent::Opaque { bytes } => (bytes, None, None),
    };
    let secret = STANDARD
        .decode(secret)
        .map(Zeroizing::new)
        .map_err(|_| malformed("the resource's bytes are not base64"))?;
    let rollback = self::rollback(rollback)?;
    let summary = work(broker, move |broker| {
        let resource = match open {
            Some(open) => NewResource::Grant {
                envelope: &secret,
                rollback: rollback.as_deref(),
                open,
            },
            None => NewResource::Opaque(&secret),
        };
        broker.put_resource(&path, body.service.as_deref(), resource)
    })
    .await?;
    if summary.access == Some(Access::Open) {
        tracing::warn!(
            path = summary.path,
            "the grant is open: whoever reaches the enclave may use this model, without an API key"
        );
    }
    Ok(Json(summary).into_response())
}

async fn delete_resource(
    State(broker): State<Arc<Broker>>,
    Path(parts): Path<(String, String, String)>,
) -> Result<Json<Value>, Broken> {
    let path = resource_path(parts)?;
    work(broker, move |broker| broker.delete_resource(&path)).await?;
    Ok(Json(json!({})))
}

fn rollback(text: Option<&str>) -> Result<Option<Vec<u8>>, Broken> {
    text.map(|text| STANDARD.decode(text))
        .transpose()
        .map_err(|_| malformed("the rollback's bytes are not base64"))
}

fn resource_path(
    (repository, kind, tag): (String, String, String),
) -> Result<ResourcePath, Broken> {
    format!("{repository}/{kind}/{tag}")
        .parse()
        .map_err(|error: casemate_release::Malformed| malformed(&error.to_string()))
}

async fn show_log(
    State(broker): State<Arc<Broker>>,
    Query(range): Query<LogRange>,
) -> Result<Json<Value>, Broken> {
    let limit = range.limit.min(MAX_ENTRIES);
    let entries = work(broker, move |broker| broker.entries(range.from, limit)).await?;
    Ok(Json(json!({ "entries": entries })))
}

async fn verify_log(
    State(broker): State<Arc<Broker>>,
    Query(query): Query<LogAnchors>,
) -> Result<Json<Head>, Broken> {
    let wrong = || malformed("an anchor is SIZE:HEX, with commas between several");
    let anchors = query.anchors.as_deref().unwrap_or_default();
    let anchors = anchors.split_terminator(',').map(parse_anchor);
    let anchors = anchors.collect::<Option<Vec<_>>>().ok_or_else(wrong)?;
    Ok(Json(
        work(broker, move |broker| broker.verify_log(&anchors)).await?,
    ))
}

/// Parses `SIZE:HEX`, a head as credentials state it.
pub fn parse_anchor(text: &str) -> Option<Anchor> {
    let (size, hash) = text.split_once(':')?;
    let hash: [u8; 32] = hex::decode(hash).ok()?.try_into().ok()?;
    Some(Anchor {
        size: size.parse().ok()?,
        hash: hash.into(),
    })
}

/// Why a request to a broker's socket had no success.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody listens there, or this user may not connect.
    #[error("{path}: {source}; is casemate-broker serving, and is this its user?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke or gave no sensible answer.
    #[error("the broker gave no sensible answer: {0}")]
    Protocol(String),
    /// The broker refused.
    #[error("{detail}")]
    Refused {
        /// Name of the kind of error.
        kind: String,
        /// One sentence.
        detail: String,
    },
}

/// A client of the socket; one connection per request.
pub struct AdminClient {
    socket: PathBuf,
}

impl AdminClient {
    /// A client of the broker at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Identity, policy, counts, end of the log.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn status(&self) -> Result<Value, AdminError> {
        self.send(Method::GET, "/status", None).await
    }

    /// Version and text of the policy in force.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn policy(&self) -> Result<Value, AdminError> {
        self.send(Method::GET, "/policy", None).await
    }

    /// Puts a policy into force.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn set_policy(
        &self,
        toml: String,
        rollback: Option<&[u8]>,
    ) -> Result<Value, AdminError> {
        let rollback = rollback.map(|envelope| STANDARD.encode(envelope));
        let body = serialise(&SetPolicy { toml, rollback })?;
        self.send(Method::PUT, "/policy", Some(body)).await
    }

    /// Lists resources.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn resources(&self) -> Result<Value, AdminError> {
        self.send(Method::GET, "/resource", None).await
    }

    /// Stores a resource.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn put_resource(
        &self,
        path: &ResourcePath,
        service: Option<String>,
        resource: NewResource<'_>,
    ) -> Result<Value, AdminError> {
        let resource = match resource {
            NewResource::Grant {
                envelope,
                rollback,
                open,
            } => Sent::Grant {
                envelope: STANDARD.encode(envelope),
                rollback: rollback.map(|envelope| STANDARD.encode(envelope)),
                open,
            },
            NewResource::Opaque(bytes) => Sent::Opaque {
                bytes: STANDARD.encode(bytes),
            },
        };
        let body = PutResource { resource, service };
        let body = serialise(&body)?;
        self.send(Method::PUT, &format!("/resource/{path}"), Some(body))
            .await
    }

    /// Deletes a resource.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn delete_resource(&self, path: &ResourcePath) -> Result<Value, AdminError> {
        self.send(Method::DELETE, &format!("/resource/{path}"), None)
            .await
    }

    /// Log entries.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn log(&self, from: u64, limit: u64) -> Result<Value, AdminError> {
        self.send(
            Method::GET,
            &format!("/log?from={from}&limit={limit}"),
            None,
        )
        .await
    }

    /// Checks the whole log, which must contain all anchors.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn verify_log(&self, anchors: &[Anchor]) -> Result<Value, AdminError> {
        let anchors: Vec<String> = anchors
            .iter()
            .map(|anchor| format!("{}:{}", anchor.size, hex::encode(anchor.hash.bytes())))
            .collect();
        let path = format!("/log/verify?anchors={}", anchors.join(","));
        self.send(Method::GET, &path, None).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Value, AdminError> {
        let exchange = self.exchange(method, path, body);
        match tokio::time::timeout(REPLY_TIMEOUT, exchange).await {
            Ok(outcome) => outcome,
            Err(_) => Err(AdminError::Protocol("no answer in time".into())),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Value, AdminError> {
        let broken = |error: &dyn std::fmt::Display| AdminError::Protocol(error.to_string());
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| AdminError::Connect {
                    path: self.socket.clone(),
                    source,
                })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "casemate-broker")
            .header("content-type", "application/json")
            .body(Body::from(body.unwrap_or_default()))
            .map_err(|error| broken(&error))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| broken(&error))?;
        let status = response.status();
        let bytes = to_bytes(Body::new(response.into_body()), MAX_REPLY_BYTES)
            .await
            .map_err(|error| broken(&error))?;
        drop(sender);
        connection.abort();
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| broken(&error));
        }
        Err(match serde_json::from_slice::<ErrorInformation>(&bytes) {
            Ok(ErrorInformation { kind, detail, .. }) => AdminError::Refused { kind, detail },
            Err(_) => AdminError::Protocol(format!("status {status}")),
        })
    }
}

fn serialise<T: Serialize>(body: &T) -> Result<Vec<u8>, AdminError> {
    serde_json::to_vec(body).map_err(|error| AdminError::Protocol(error.to_string()))
}
