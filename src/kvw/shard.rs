//! A job in parts: which samples are whose, and how the parts become the whole again.
//!
//! In: the number of samples, the batch size, `index/count`. Out: a range of samples; later, from the
//! parts that were collected, the coefficients of the whole set.
//!
//! Promises: a batch is never divided, so every forward pass is the one that the undivided job makes,
//! and sums are exact ([`FixedSum`](super::FixedSum)): merged parts are bit-identical to the undivided
//! result, for any number of parts in any order. A gap, an overlap or a part of another job is an error
//! that names the file.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Coefficients, Error};

/// Which part of a job: number `index`, from 0, of `count`. Written `3/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// Number `index`, from 0, of `count`.
    ///
    /// # Errors
    /// `index` is not below `count`.
    pub fn new(index: usize, count: usize) -> Result<Shard, String> {
        match index < count {
            true => Ok(Shard { index, count }),
            false => Err(format!(
                "expected an index from 0 to count - 1, found {index}/{count}"
            )),
        }
    }

    /// Its number, from 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// How many parts there are.
    pub fn count(self) -> usize {
        self.count
    }

    /// Its part of `samples` samples of which `together` are never divided: whole groups, shared out
    /// evenly. Empty where there are more parts than groups.
    pub fn range(self, samples: usize, together: usize) -> Range<usize> {
        let together = together.max(1);
        let groups = samples.div_ceil(together) as u128;
        let border = |index: usize| {
            let group = groups * index as u128 / self.count as u128;
            let group = usize::try_from(group).unwrap_or(usize::MAX);
            group.saturating_mul(together).min(samples)
        };
        border(self.index)..border(self.index + 1)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Shard, String> {
        let parts = text.split_once('/');
        let numbers = parts.and_then(|(index, count)| {
            Some((index.trim().parse().ok()?, count.trim().parse().ok()?))
        });
        match numbers {
            Some((index, count)) => Shard::new(index, count),
            None => Err(format!("expected INDEX/COUNT like 3/16, found '{text}'")),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// Which samples of which job a file of coefficients covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Digest of everything that the sums depend on: model, data, layers, moment, batch size, runtime.
    pub job: String,
    /// The first sample, from 0.
    pub start: u64,
    /// The sample after the last one.
    pub end: u64,
    /// Samples of the whole job.
    pub of: u64,
}

/// A file that holds a part of a job.
#[derive(Clone, Debug)]
pub struct PartFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// What it covers.
    pub part: Part,
    /// Its sums.
    pub coefficients: Coefficients,
    /// The job's provenance.
    pub provenance: serde_json::Value,
}

/// The coefficients of the whole set, with the job's provenance, from its parts in any order.
///
/// # Errors
/// No part, a part of another job, samples that no part or more than one part covers, sums that
/// overflow.
pub fn merge(mut parts: Vec<PartFile>) -> Result<(Coefficients, serde_json::Value), Error> {
    // A part without samples begins where another one does: it comes first.
    parts.sort_by_key(|file| (file.part.start, file.part.end));
    let mut parts = parts.into_iter();
    let first = parts.next().ok_or(Error::Empty { set: "merged" })?;
    let Part { job, of, .. } = first.part.clone();
    let mut covered = 0;
    let mut whole: Option<Coefficients> = None;
    let provenance = first.provenance.clone();
    let mut last = first.path.clone();
    for part in std::iter::once(first).chain(parts) {
        let wrong = |expected: String, found: String| Error::Part {
            path: part.path.clone(),
            expected,
            found,
        };
        if part.part.job != job || part.provenance != provenance || part.part.of != of {
            return Err(wrong(
                format!("a part of job {job} ({of} samples)"),
                format!("one of job {} ({} samples)", part.part.job, part.part.of),
            ));
        }
        if part.part.start != covered {
            return Err(wrong(
                format!(
                    "a part that begins at sample {covered}, where {} ends",
                    last.display()
                ),
                format!("samples {}..{}", part.part.start, part.part.end),
            ));
        }
        covered = part.part.end;
        last.clone_from(&part.path);
        whole = Some(match whole {
            None => part.coefficients,
            Some(mut whole) => {
                whole.merge(&part.coefficients)?;
                whole
            }
        });
    }
    match whole {
        Some(whole) if covered == of => Ok((whole, provenance)),
        _ => Err(Error::Part {
            path: last,
            expected: format!("parts up to sample {of}"),
            found: format!("none after sample {covered}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ndarray::Array1;
    use proptest::prelude::*;

    use super::*;
    use crate::graph::Moment;
    use crate::kvw::Sums;

    /// The coefficients of samples whose sums are `values`.
    fn of(values: &[f32]) -> Coefficients {
        let mut sums = Coefficients::new(Moment::Absolute, &[(4.into(), 2)]);
        for &value in values {
            let sample = Sums {
                layers: BTreeMap::from([(4.into(), Array1::from(vec![value, value.sqrt()]))]),
                weight: 3.0,
                ..Sums::default()
            };
            sums.add(&sample, 1, "sample").unwrap();
        }
        sums
    }

    fn part(values: &[f32], range: Range<usize>, job: &str) -> PartFile {
        PartFile {
            path: format!("{}-{}", range.start, range.end).into(),
            part: Part {
                job: job.into(),
                start: range.start as u64,
                end: range.end as u64,
                of: values.len() as u64,
            },
            coefficients: of(&values[range]),
            provenance: serde_json::json!({"job": job}),
        }
    }

    fn parts(values: &[f32], count: usize, batch_size: usize) -> Vec<PartFile> {
        (0..count)
            .map(|index| Shard::new(index, count).unwrap())
            .map(|shard| part(values, shard.range(values.len(), batch_size), "a"))
            .collect()
    }

    proptest! {
        #[test]
        fn parts_in_any_order_are_the_whole(
            values in prop::collection::vec(0f32..1e9, 1..80),
            count in 1usize..70, batch_size in 1usize..5, seed in any::<u64>(),
        ) {
            let mut parts = parts(&values, count, batch_size);
            let turn = usize::try_from(seed % count as u64).unwrap();
            parts.rotate_left(turn);
            if seed % 2 == 0 {
                parts.reverse();
            }
            prop_assert_eq!(merge(parts).unwrap().0, of(&values));
        }

        #[test]
        fn ranges_are_whole_batches_and_cover_every_sample_once(
            samples in 0usize..1000, count in 1usize..70, batch_size in 1usize..9,
        ) {
            let mut next = 0;
            for index in 0..count {
                let range = Shard::new(index, count).unwrap().range(samples, batch_size);
                prop_assert_eq!(range.start, next);
                prop_assert!(range.end == samples || range.end.is_multiple_of(batch_size));
                next = range.end;
            }
            prop_assert_eq!(next, samples);
        }
    }

    #[test]
    fn a_gap_an_overlap_and_a_foreign_part_are_refused_by_name() {
        let values: Vec<f32> = (0..10u8).map(f32::from).collect();
        let cut = |ranges: &[(usize, usize)]| {
            merge(
                ranges
                    .iter()
                    .map(|&(start, end)| part(&values, start..end, "a"))
                    .collect(),
            )
        };
        for (ranges, expected) in [
            (
                &[(0, 3), (4, 10)][..],
                "4-10: expected a part that begins at sample 3",
            ),
            (
                &[(0, 5), (4, 10)],
                "4-10: expected a part that begins at sample 5",
            ),
            (
                &[(0, 5), (0, 5), (5, 10)],
                "0-5: expected a part that begins at sample 5",
            ),
            (&[(1, 10)], "1-10: expected a part that begins at sample 0"),
            (
                &[(0, 9)],
                "0-9: expected parts up to sample 10, found none after sample 9",
            ),
        ] {
            let error = cut(ranges).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let foreign = vec![part(&values, 0..5, "a"), part(&values, 5..10, "b")];
        let error = merge(foreign).unwrap_err().to_string();
        assert!(error.contains("5-10: expected a part of job a"), "{error}");
        assert!(merge(Vec::new()).is_err());
    }

    #[test]
    fn an_index_outside_the_count_is_refused() {
        for text in ["3/3", "0/0", "1", "a/2", "-1/2", "1/2/3"] {
            assert!(text.parse::<Shard>().is_err(), "{text}");
        }
        assert_eq!("3/16".parse::<Shard>().unwrap().to_string(), "3/16");
    }
}
