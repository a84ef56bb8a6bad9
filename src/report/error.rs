//! Why a report was not made.

use std::path::PathBuf;

use crate::files::Sha256;

/// Why a report was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The folder could not be checked.
    #[error(transparent)]
    Check(#[from] crate::check::Error),
    /// The folder cannot be read.
    #[error(transparent)]
    Edit(#[from] crate::edit::Error),
    /// The evaluation cannot be used.
    #[error(transparent)]
    Eval(#[from] crate::eval::Error),
    /// The plan cannot be read.
    #[error(transparent)]
    Plan(#[from] crate::kvw::Error),
    /// The sweep cannot be read.
    #[error(transparent)]
    Sweep(#[from] crate::sweep::Error),
    /// A plan that is not the one that the folder was made with.
    #[error(
        "{}: expected the plan of {} ({expected}), found {found}",
        plan.display(), folder.display()
    )]
    OtherPlan {
        /// The plan's file.
        plan: PathBuf,
        /// The model folder.
        folder: PathBuf,
        /// The receipt's digest of the gates.
        expected: Sha256,
        /// The plan's.
        found: Sha256,
    },
    /// Probes of another plan than the one that the folder was made with.
    #[error(
        "{}: expected probes of the plan of {} ({expected}), found {}",
        probes.display(), folder.display(),
        found.map_or_else(|| "none named".to_owned(), |found| found.to_string())
    )]
    OtherProbes {
        /// The probes' file.
        probes: PathBuf,
        /// The model folder.
        folder: PathBuf,
        /// The receipt's digest of the gates.
        expected: Sha256,
        /// The digest that the file names.
        found: Option<Sha256>,
    },
    /// A picture's set cannot be read.
    #[error(transparent)]
    Dataset(#[from] crate::dataset::Error),
    /// A picture cannot be read, or is none.
    #[error(transparent)]
    Picture(#[from] crate::preprocess::Error),
    /// A small picture could not be made.
    #[error("a picture could not be made smaller")]
    Image(#[from] image::ImageError),
    /// A plot could not be drawn.
    #[error("a plot could not be drawn")]
    Plot(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The page could not be put together: a defect of this tool.
    #[error("the page could not be put together")]
    Template(#[from] minijinja::Error),
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Check(error) => error.hint(),
            Error::Edit(error) => error.hint(),
            Error::Eval(error) => error.hint(),
            Error::Plan(error) => error.hint(),
            Error::Sweep(error) => error.hint(),
            Error::OtherPlan { .. } => {
                Some("leave --plan out, or give the plan that `kvw unlearn --plan` kept".to_owned())
            }
            Error::OtherProbes { .. } => {
                Some("give a file that `kvw probe -o` wrote, with the folder's plan".to_owned())
            }
            Error::Dataset(error) => error.hint(),
            Error::Picture(error) => error.hint(),
            Error::Image(_) | Error::Plot(_) | Error::Template(_) => None,
        }
    }
}
