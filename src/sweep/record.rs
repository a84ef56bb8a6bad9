//! The sweep's file: every finished point, the front and the pick.
//!
//! In: a path. Out: a [`Sweep`], written whole after each point, so that a sweep that is killed loses
//! the points under way and no other. Points are sorted, and nothing in the file tells the time.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::objective::front;
use super::{Error, Measure, Objective, Pick, Point, Tradeoff};
use crate::eval::{Direction, Level, Summary, metric};
use crate::files::{json, read_limited, write_atomic};
use crate::kvw::PlanSummary;
use crate::limits;

/// What the numbers of a sweep depend on, by name: digests of the model and the data, the rule, the
/// loop's options, how sets are evaluated, and which runtime ran.
pub type Binding = BTreeMap<String, String>;

const FORMAT: &str = "kvw-sweep";
const SCHEMA_VERSION: u32 = 1;

/// A point that was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// The setting.
    #[serde(flatten)]
    pub point: Point,
    /// What the plan does; none where no plan came of it.
    pub plan: Option<PlanSummary>,
    /// Every set under the plan, by name.
    pub sets: BTreeMap<String, Summary>,
    /// Why no plan came of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Where the point lies; none where it failed.
    pub tradeoff: Option<Tradeoff>,
}

impl std::fmt::Display for Finished {
    /// The setting, and what came of it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = |value: f64| format!("{:.0} %", 100.0 * value);
        write!(f, "{}: ", self.point)?;
        match (&self.tradeoff, &self.failed) {
            (Some(at), _) => write!(
                f,
                "forget {}, retain {} ({} of untouched)",
                percent(at.forget),
                percent(at.retain),
                percent(at.retain_share)
            ),
            (None, Some(failed)) => f.write_str(failed),
            (None, None) => f.write_str("no numbers"),
        }
    }
}

/// A sweep, as it is in its file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    schema_version: u32,
    format: String,
    tool_version: String,
    /// What the points depend on.
    pub binding: Binding,
    /// What is looked for.
    pub objective: Objective,
    /// Every set on the untouched model, by name; empty until that was run.
    pub untouched: BTreeMap<String, Summary>,
    /// The finished points, in the order of [`Point::order`].
    pub points: Vec<Finished>,
    /// Indices of the points that no other beats.
    pub front: Vec<usize>,
    /// The point that the objective picks.
    pub pick: Option<Pick>,
}

impl Sweep {
    /// A sweep without points.
    pub fn new(binding: Binding, objective: Objective) -> Sweep {
        Sweep {
            schema_version: SCHEMA_VERSION,
            format: FORMAT.to_owned(),
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            binding,
            objective,
            untouched: BTreeMap::new(),
            points: Vec::new(),
            front: Vec::new(),
            pick: None,
        }
    }

    /// Reads the file of a sweep.
    ///
    /// # Errors
    /// It cannot be read, is too large, or is no sweep of this version.
    pub fn read(path: &Path) -> Result<Sweep, Error> {
        let format = |expected: String, found: String| Error::Format {
            path: path.to_owned(),
            expected,
            found,
        };
        let bytes = read_limited(path, limits::SWEEP_BYTES)?;
        let not_json = |source| Error::Json {
            path: path.to_owned(),
            source,
        };
        #[derive(Deserialize)]
        struct Head {
            schema_version: Option<u32>,
            format: Option<String>,
        }
        let head: Head = json::read_format(&bytes).map_err(not_json)?;
        let found = (head.format.as_deref(), head.schema_version);
        if found != (Some(FORMAT), Some(SCHEMA_VERSION)) {
            return Err(format(
                format!("format {FORMAT}, schema_version {SCHEMA_VERSION}"),
                match found {
                    (Some(name), Some(version)) => {
                        format!("format {name}, schema_version {version}")
                    }
                    _ => "another file".into(),
                },
            ));
        }
        json::read_format(&bytes).map_err(not_json)
    }

    /// Fails where the points of this sweep, read from `path`, depend on anything else than `binding`.
    ///
    /// # Errors
    /// The first thing that differs.
    pub fn check(&self, binding: &Binding, path: &Path) -> Result<(), Error> {
        let mut names: Vec<&String> = binding.keys().chain(self.binding.keys()).collect();
        names.sort();
        let of = |binding: &Binding, name: &str| {
            let value = binding.get(name);
            value.cloned().unwrap_or_else(|| "none".to_owned())
        };
        match names
            .into_iter()
            .find(|name| binding.get(*name) != self.binding.get(*name))
        {
            None => Ok(()),
            Some(name) => Err(Error::OtherSweep {
                path: path.to_owned(),
                what: name.clone(),
                expected: of(binding, name),
                found: of(&self.binding, name),
            }),
        }
    }

    /// Those of `points` that are not finished.
    pub fn pending(&self, points: &[Point]) -> Vec<Point> {
        let finished = |point: &&Point| !self.points.iter().any(|other| other.point == **point);
        points.iter().filter(finished).cloned().collect()
    }

    /// Adds a finished point.
    pub fn push(&mut self, finished: Finished) {
        let at = self
            .points
            .partition_point(|other| other.point.order(&finished.point).is_lt());
        self.points.insert(at, finished);
    }

    /// Works out where the points lie, the front and the pick.
    ///
    /// # Errors
    /// The objective's metric is not one that the sets have.
    pub fn judge(&mut self) -> Result<(), Error> {
        let Objective { forget, retain, .. } = self.objective.clone();
        value(&self.untouched, &forget)?;
        let untouched = value(&self.untouched, &retain)?;
        for finished in &mut self.points {
            finished.tradeoff = match &finished.plan {
                None => None,
                Some(plan) => {
                    let forgotten = value(&finished.sets, &forget)?;
                    let kept = value(&finished.sets, &retain)?;
                    Some(Tradeoff::new(forgotten, kept, untouched, plan.mean_gate))
                }
            };
        }
        let places: Vec<_> = self.points.iter().map(|point| point.tradeoff).collect();
        self.front = front(&places);
        self.pick = Some(self.objective.pick(&places));
        Ok(())
    }

    /// The point that was picked.
    pub fn picked(&self) -> Option<&Finished> {
        self.points.get(self.pick.as_ref()?.point?)
    }

    /// The point that comes nearest, where none was picked.
    pub fn nearest(&self) -> Option<&Finished> {
        self.points.get(self.pick.as_ref()?.nearest?)
    }

    /// The point that was picked, or why there is none.
    ///
    /// # Errors
    /// [`Error::TargetMissed`], with the point that comes nearest.
    pub fn pick_or_nearest(&self) -> Result<&Finished, Error> {
        self.picked().ok_or_else(|| {
            let nearest = self.nearest().map_or_else(
                || "no setting could be run".to_owned(),
                |nearest| format!("the nearest is {nearest}"),
            );
            Error::TargetMissed(format!(
                "no setting does what was asked for ({}); {nearest}",
                self.objective.rule()
            ))
        })
    }

    /// Removes the file of an earlier sweep, if there is one.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(path: &Path) -> Result<(), Error> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(crate::files::Error::io("remove", path)(error).into())
            }
            _ => Ok(()),
        }
    }

    /// Writes the file, in place of an earlier state.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(self).map_err(|source| Error::Json {
            path: path.to_owned(),
            source,
        })?;
        Ok(write_atomic(path, true, |file| {
            file.write_all(&text)?;
            file.write_all(b"\n")
        })?)
    }
}

/// The value of `measure` among `sets`.
fn value(sets: &BTreeMap<String, Summary>, measure: &Measure) -> Result<f64, Error> {
    let no_metric = |reason: String| Error::NoMetric {
        metric: measure.metric.clone(),
        set: measure.set.clone(),
        reason,
    };
    let known =
        metric(&measure.metric).ok_or_else(|| no_metric("there is no such metric".into()))?;
    if known.direction != Direction::Known || known.level != Level::Sample {
        return Err(no_metric(
            "expected a metric of which more means that more is known".into(),
        ));
    }
    let summary = sets
        .get(&measure.set)
        .ok_or_else(|| no_metric("there is no such set".into()))?;
    let estimate = summary
        .get(&measure.metric)
        .ok_or_else(|| no_metric("the set does not have it".into()))?;
    let reason = estimate.reason.as_deref().unwrap_or("it has no value");
    estimate.value.ok_or_else(|| no_metric(reason.to_owned()))
}
