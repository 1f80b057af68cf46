//! The adapters that are loaded beside the model: what they are called, and who may use each.

use std::sync::{PoisonError, RwLock};

use casemate_container::ModelDigest;
use casemate_release::api_key;

use crate::access::Caller;
use crate::api::PerturbationKey;

/// An adapter that requests can name as their model.
pub struct Offered {
    /// What requests call it.
    pub name: String,
    /// What names it.
    pub digest: ModelDigest,
    /// Its version, which the grant in force must still allow.
    pub version: u64,
    /// For the noise on what is shown of its answers.
    pub(crate) perturbation: PerturbationKey,
    users: RwLock<api_key::Access>,
}

impl Offered {
    /// An adapter for whom its grant lets in.
    #[must_use]
    pub fn new(
        name: String,
        digest: ModelDigest,
        version: u64,
        users: api_key::Access,
        perturbation: PerturbationKey,
    ) -> Self {
        Self {
            name,
            digest,
            version,
            perturbation,
            users: RwLock::new(users),
        }
    }

    /// Takes what a newer grant says.
    pub fn replace_users(&self, users: &api_key::Access) {
        *self.users.write().unwrap_or_else(PoisonError::into_inner) = users.clone();
    }

    /// Whether `caller`, whom the model's grant lets in, may use it: anybody, or who has one of the keys that its own grant
    /// lists. Limits count where the model's grant has them.
    #[must_use]
    pub fn lets_in(&self, caller: Option<&Caller>) -> bool {
        let users = self.users.read().unwrap_or_else(PoisonError::into_inner);
        let Some(keys) = users.api_keys() else {
            return users.is_open();
        };
        caller.is_some_and(|caller| caller.has_one_of(keys.as_slice()))
    }
}
