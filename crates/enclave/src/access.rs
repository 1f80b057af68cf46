//! Who asks: known inside the attested channel only, before the API sees a request.

use std::sync::Arc;

/// Who made an inner request, as a request extension: the holder of an API key of the grant, or anybody, where the grant
/// lists none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Caller(Option<Arc<str>>);

impl Caller {
    /// Somebody who needed no key.
    #[must_use]
    pub fn anonymous() -> Self {
        Self(None)
    }

    /// The holder of the API key of this name.
    #[must_use]
    pub fn named(name: impl Into<Arc<str>>) -> Self {
        Self(Some(name.into()))
    }

    /// The name of the API key, as the provider wrote it into the grant.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0.as_deref()
    }
}
