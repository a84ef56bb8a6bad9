//! What a report is made of, where it lies.
//!
//! In: paths. Out: everything read, checked to belong together, and put into a [`Subject`].

use std::path::Path;

use super::{Error, Pictures, Subject};
use crate::bundle::Tree;
use crate::check::{self, Policy, check};
use crate::dataset::Dataset;
use crate::edit::{self, Receipt, gates_digest};
use crate::eval::{Evidence, Record};
use crate::files::RECEIPT;
use crate::kvw::load_plan;
use crate::sweep::Sweep;

/// What a report is made of.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The model folder.
    pub folder: &'a Path,
    /// The evaluation's file. Without it the numbers are those in the receipt.
    pub evidence: Option<&'a Path>,
    /// The plan.
    pub plan: Option<&'a Path>,
    /// A file of `kvw probe`.
    pub probes: Option<&'a Path>,
    /// A sweep's file.
    pub sweep: Option<&'a Path>,
    /// The policy to judge by; without one only the files are checked.
    pub policy: Option<&'a Path>,
    /// The model that the folder was made from.
    pub original: Option<&'a Path>,
    /// Sets whose pictures are shown.
    pub data: &'a [Dataset],
    /// As [`Subject::samples`].
    pub samples: usize,
}

impl Sources<'_> {
    /// Reads everything and makes a report of it.
    ///
    /// # Errors
    /// Something cannot be read, or the plan is not the folder's. What is wrong with the *folder* is in
    /// the report.
    pub fn render<T>(
        &self,
        form: impl FnOnce(&Subject<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let policy = match self.policy {
            Some(path) => Policy::read(path)?,
            None => Policy::default(),
        };
        let evidence = self.evidence.map(Evidence::read).transpose()?;
        let verdict = check(
            &check::Subject {
                folder: self.folder,
                original: self.original,
                evidence: evidence.as_ref(),
            },
            &policy,
        )?;
        let tree = Tree::of_folder(self.folder).map_err(edit::Error::from)?;
        // A receipt that cannot be read is a finding of the verdict.
        let receipt = Receipt::of(&tree).ok().flatten();
        let record = receipt.as_ref().and_then(|receipt| {
            let path = self.folder.join(RECEIPT);
            Record::from_value(&path, receipt.evaluation.as_ref()?).ok()
        });
        let plan = self.plan.map(load_plan).transpose()?;
        if let (Some(path), Some((plan, _)), Some(receipt)) = (self.plan, &plan, &receipt) {
            let found = gates_digest(&plan.gates);
            if found != receipt.plan_digest {
                return Err(Error::OtherPlan {
                    plan: path.to_owned(),
                    folder: self.folder.to_owned(),
                    expected: receipt.plan_digest,
                    found,
                });
            }
        }
        let probes = self.probes.map(Evidence::read).transpose()?;
        if let (Some(path), Some((probes, _)), Some(receipt)) = (self.probes, &probes, &receipt)
            && probes.plan_digest != Some(receipt.plan_digest)
        {
            return Err(Error::OtherProbes {
                probes: path.to_owned(),
                folder: self.folder.to_owned(),
                expected: receipt.plan_digest,
                found: probes.plan_digest,
            });
        }
        let sweep = self.sweep.map(Sweep::read).transpose()?;
        let pictures = match self.samples {
            0 => Pictures::default(),
            samples => Pictures::of(self.data, samples)?,
        };
        form(&Subject {
            verdict: &verdict,
            receipt: receipt.as_ref(),
            evidence: match (&evidence, &record) {
                (Some((evidence, _)), _) => Some(evidence),
                (None, Some(record)) => Some(&record.evidence),
                (None, None) => None,
            },
            plan: plan.as_ref().map(|(plan, _)| plan),
            probes: probes.as_ref().map(|(probes, _)| probes),
            sweep: sweep.as_ref(),
            pictures: &pictures,
            samples: self.samples,
        })
    }
}
