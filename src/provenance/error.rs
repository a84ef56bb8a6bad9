//! What can go wrong with signing and verifying.

use std::path::PathBuf;

/// Why a folder could not be signed, or what should vouch for it not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The folder cannot be listed.
    #[error(transparent)]
    Bundle(#[from] crate::bundle::Error),
    /// The receipt cannot be read.
    #[error(transparent)]
    Edit(#[from] crate::edit::Error),
    /// A file cannot be read or written.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// A folder without a receipt: nothing is known of where it comes from.
    #[error("{}: expected a folder with a receipt (kvw.json), found none", folder.display())]
    NoReceipt {
        /// The folder.
        folder: PathBuf,
    },
    /// What the folder was made from is not that.
    #[error("{}: '{file}': expected the bytes that the receipt names, found others", folder.display())]
    OtherOriginal {
        /// The folder that was said to be the original.
        folder: PathBuf,
        /// The file in it.
        file: String,
    },
    /// A key file that cannot be used.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What it must hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },
    /// A file that should vouch for the folder is not of its format.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What its format asks for.
        expected: String,
        /// What it holds.
        found: String,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Bundle(error) => error.hint(),
            Error::Edit(error) => error.hint(),
            Error::Files(error) => error.hint(),
            Error::NoReceipt { .. } => Some("sign what `kvw apply` or `kvw unlearn` wrote".into()),
            Error::OtherOriginal { .. } => {
                Some("--original is the folder that the unlearned one was made from".into())
            }
            Error::Key { .. } => Some(
                "openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out key.pem; \
                 openssl ec -in key.pem -pubout -out public.pem"
                    .into(),
            ),
            Error::Format { .. } => None,
        }
    }
}
