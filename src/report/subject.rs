//! What a report is about.

use super::Pictures;
use crate::check::Verdict;
use crate::edit::Receipt;
use crate::eval::Evidence;
use crate::kvw::Plan;
use crate::sweep::Sweep;

/// Everything that is known of one unlearning. Only the verdict must be there.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// What [`check`](crate::check::check) found.
    pub verdict: &'a Verdict,
    /// The folder's receipt.
    pub receipt: Option<&'a Receipt>,
    /// Its evaluation.
    pub evidence: Option<&'a Evidence>,
    /// The gates.
    pub plan: Option<&'a Plan>,
    /// What a file of `kvw probe` holds.
    pub probes: Option<&'a Evidence>,
    /// The settings that were tried.
    pub sweep: Option<&'a Sweep>,
    /// The samples' pictures.
    pub pictures: &'a Pictures,
    /// Samples shown of each set, at most. 0: no question, answer, name or picture is in the report.
    pub samples: usize,
}
