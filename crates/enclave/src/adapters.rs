//! The adapters that are loaded beside the model: what they are called, and who may use each.

use std::sync::{PoisonError, RwLock};

use casemate_container::ModelDigest;
use casemate_release::api_key::{self, ApiKey, ApiKeys};

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
    /// None: nobody, for the moment.
    users: RwLock<Option<api_key::Access>>,
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
            users: RwLock::new(Some(users)),
        }
    }

    /// Takes what a newer grant says.
    pub fn replace_users(&self, users: &api_key::Access) {
        *self.users.write().unwrap_or_else(PoisonError::into_inner) = Some(users.clone());
    }

    /// Lets nobody in whom a newer grant does not let in. Whom it adds waits for [`Self::replace_users`].
    pub fn withdraw(&self, newer: &api_key::Access) {
        let mut users = self.users.write().unwrap_or_else(PoisonError::into_inner);
        let Some(newer_keys) = newer.api_keys() else {
            return;
        };
        let Some(held) = users.take() else { return };
        *users = match held.api_keys() {
            None => Some(newer.clone()),
            Some(keys) => {
                let newer = newer_keys.as_slice();
                let stays = |key: &&ApiKey| newer.iter().any(|other| other.hash == key.hash);
                let keys = keys.as_slice().iter().filter(stays).cloned().collect();
                // A list of none is no list, and lets nobody in.
                ApiKeys::new(keys).ok().map(api_key::Access::Keyed)
            }
        };
    }

    /// Whether `caller`, whom the model's grant lets in, may use it: anybody, or who has one of the keys that its own grant
    /// lists. Limits count where the model's grant has them.
    #[must_use]
    pub fn lets_in(&self, caller: Option<&Caller>) -> bool {
        let users = self.users.read().unwrap_or_else(PoisonError::into_inner);
        let Some(users) = &*users else { return false };
        let Some(keys) = users.api_keys() else {
            return users.is_open();
        };
        caller.is_some_and(|caller| caller.has_one_of(keys.as_slice()))
    }
}
