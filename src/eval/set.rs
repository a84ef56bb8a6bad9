//! The sets of an evaluation: what each is called, and which of its samples are asked.
//!
//! In: datasets, and what each is for. Out: [`EvaluatedSet`]s, and, with what the models made of them,
//! their entries in the evaluation file. Promise: sets that are evaluated together have different names,
//! and a row that was left out is named in the file.

use std::path::Path;

use super::evidence::{EvidenceSet, Measured, Role, SetKind, set_names};
use crate::dataset::{self, Dataset, Sample};

/// A set that was read, of which the first samples are evaluated.
#[derive(Clone, Debug)]
pub struct EvaluatedSet<'d> {
    /// Its name, unique among the sets that are evaluated together.
    pub name: String,
    /// What it is for.
    pub kind: SetKind,
    /// All of it.
    pub data: &'d Dataset,
    /// Samples to evaluate, at most.
    pub limit: usize,
}

impl<'d> EvaluatedSet<'d> {
    /// Sets that are evaluated together, the first `limit` samples of each.
    pub fn all(
        sets: impl IntoIterator<Item = (SetKind, &'d Dataset)>,
        limit: usize,
    ) -> Vec<EvaluatedSet<'d>> {
        let sets: Vec<_> = sets.into_iter().collect();
        let paths: Vec<&Path> = sets.iter().map(|(_, data)| data.path.as_path()).collect();
        let named = set_names(&paths).into_iter().zip(sets);
        named
            .map(|(name, (kind, data))| EvaluatedSet {
                name,
                kind,
                data,
                limit,
            })
            .collect()
    }

    /// What was to be forgotten, what was to be kept, where there is such a set, and `more`; as [`EvaluatedSet::all`].
    pub fn with(
        forget: &'d Dataset,
        retain: Option<&'d Dataset>,
        more: impl IntoIterator<Item = (SetKind, &'d Dataset)>,
        limit: usize,
    ) -> Vec<EvaluatedSet<'d>> {
        let retain = retain.map(|data| (SetKind::Retain, data));
        let sets = std::iter::once((SetKind::Forget, forget)).chain(retain);
        EvaluatedSet::all(sets.chain(more), limit)
    }

    /// The samples to evaluate.
    pub fn samples(&self) -> &'d [Sample] {
        let samples = &self.data.samples;
        samples.get(..self.limit).unwrap_or(samples)
    }

    /// Its entry in the evaluation file, of `samples` samples.
    ///
    /// # Errors
    /// An image of the dataset can no longer be read.
    pub fn entry(
        &self,
        name: String,
        samples: usize,
        models: impl IntoIterator<Item = (Role, Measured)>,
    ) -> Result<EvidenceSet, dataset::Error> {
        Ok(EvidenceSet {
            set: name,
            kind: self.kind,
            sha256: self.data.content_sha256()?,
            samples,
            left_out: self.data.left_out(),
            probe: None,
            models: models.into_iter().collect(),
        })
    }
}
