//! What may be uploaded. A worker sees the weights it multiplies by, so only matrices whose tensors the
//! provider's signed manifest marks public may reach it, and that is a type: the only code that writes
//! weights into messages takes a [`PublicMatrix`].

use std::sync::Arc;

use casemate_container::Access;
use casemate_kernels::panels::Int8Matrix;

/// Whatever holds a matrix of int8 weights that the enclave loaded from checked tensors.
pub trait Weights: Send + Sync {
    /// The matrix, one row for each output.
    fn matrix(&self) -> &Int8Matrix;
}

impl Weights for Int8Matrix {
    fn matrix(&self) -> &Int8Matrix {
        self
    }
}

/// A matrix that others may see.
#[derive(Clone)]
pub struct PublicMatrix(Arc<dyn Weights>);

/// A matrix that stays inside, because not all of its tensors are public.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensors that the manifest does not mark public stay in the enclave")]
pub struct Private;

impl PublicMatrix {
    /// The matrix, if the access of its tensors, taken together, allows that others see it.
    ///
    /// # Errors
    /// [`Private`] for whatever is not public.
    pub fn new(access: Access, weights: Arc<dyn Weights>) -> Result<PublicMatrix, Private> {
        match access {
            Access::Public => Ok(PublicMatrix(weights)),
            Access::Private => Err(Private),
        }
    }

    /// The weights, to be multiplied with or to be sent.
    #[must_use]
    pub fn matrix(&self) -> &Int8Matrix {
        self.0.matrix()
    }
}
