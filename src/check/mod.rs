//! The release gate: may this folder be shipped?
//!
//! In: a model folder, a [`Policy`], and what there is beside it: the evaluation, the original. Out: a
//! [`Verdict`]: what was checked, what was found, and whether it passes. Nothing is run: receipt,
//! files and evaluation are enough, so that a machine without the data can gate a release.
//!
//! 1. [`policy`](mod@policy): TOML → what must hold;
//! 2. `integrity`: do the files hold what the receipt says, all decoders, and
//!    nothing else?
//! 3. `evidence`: is the evaluation this model's, and does it clear the bars?
//! 4. [`verdict`](mod@verdict): findings, weighed by the policy.
//!
//! Promises: a finding has a code that never changes its meaning ([`Code`]); what could not be
//! checked is a finding too; a misspelt key of a policy is an error, not a bar that nothing misses.
//! [`report`](crate::report) prints verdicts.

mod code;
mod error;
mod evidence;

mod integrity;
pub mod policy;
pub mod verdict;

use std::path::Path;

pub use code::{Code, Severity, UnknownCode};
pub use error::Error;
pub use policy::Policy;
pub use verdict::{Checked, Finding, Judged, Verdict};

use crate::bundle::Bundle;
use crate::eval::Evidence;
use crate::files::Sha256;

/// What is checked.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The model folder.
    pub folder: &'a Path,
    /// The model that it was made from, where it is at hand.
    pub original: Option<&'a Path>,
    /// Its evaluation with the file's digest, as [`Evidence::read`] returns it, where it is at hand.
    pub evidence: Option<&'a (Evidence, Sha256)>,
}

/// Checks a folder against a policy.
///
/// # Errors
/// The folder or the original cannot be read. What is *wrong* with them is in the
/// verdict.
pub fn check(subject: &Subject<'_>, policy: &Policy) -> Result<Verdict, Error> {
    let bundle = Bundle::open(subject.folder)?;
    let mut verdict = Verdict::new(subject.folder, policy);
    let receipt = integrity::check(&mut verdict, &bundle, subject, policy)?;
    let receipt = receipt.as_ref();
    evidence::check(
        &mut verdict,
        subject.folder,
        receipt,
        subject.evidence,
        policy,
    );
    Ok(verdict)
}
