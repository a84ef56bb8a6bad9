//! Why a check could not be made. What a check *finds* is no error: see [`Finding`](super::Finding).

/// Why a policy could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be reached.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// The folder is at fault.
    #[error(transparent)]
    Bundle(#[from] crate::bundle::Error),
    /// The folder's files or the original's could not be compared.
    #[error(transparent)]
    Edit(#[from] crate::edit::Error),
    /// The policy is no TOML, or not of this form.
    #[error("{policy}:{line}:{column}: {message}")]
    Policy {
        /// The policy file.
        policy: String,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// What is wrong, with what was expected and found.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Files(error) => error.hint(),
            Error::Bundle(error) => error.hint(),
            Error::Edit(error) => error.hint(),
            Error::Policy { hint, .. } => hint.clone(),
        }
    }
}
