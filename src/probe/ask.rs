//! Asks: every set as it is, then every probe of it, of the model before and after.
//!
//! In: the sets of an evaluation, a plan. Out: the entries of an evaluation file, and the probes that could
//! not be made, with the reason. No file of the model is touched: gates are inputs.

use super::{Material, PROBES};
use crate::bundle::Bundle;
use crate::dataset::Sample;
use crate::eval::{EvaluatedSet, EvidenceSet, NotAsked, Role, Settings, evaluate};
use crate::kvw::{Gates, Plan};
use crate::pipeline::{Error, Model, gates_of};
use crate::runtime::{Decoder, Engine};

/// Samples that are asked together, under one name.
pub struct Asked<'s, 'd> {
    /// The set that they are of.
    pub set: &'s EvaluatedSet<'d>,
    /// The probe that made them; none for the set as it is.
    pub probe: Option<&'static str>,
    /// What is asked.
    pub samples: Vec<Sample>,
}

impl<'s, 'd> Asked<'s, 'd> {
    /// The set as it is.
    pub fn as_it_is(set: &'s EvaluatedSet<'d>) -> Asked<'s, 'd> {
        Asked {
            set,
            probe: None,
            samples: set.samples().to_vec(),
        }
    }
}

/// Each of `sets` as it is, then each probe of it whose name is `wanted`, with as many samples as of a set
/// at most; and the probes that a set cannot have.
pub fn questions<'s, 'd>(
    sets: &'s [EvaluatedSet<'d>],
    wanted: impl Fn(&str) -> bool,
) -> (Vec<Asked<'s, 'd>>, Vec<NotAsked>) {
    let all: Vec<&Sample> = sets.iter().flat_map(|set| &set.data.samples).collect();
    let mut asked = Vec::new();
    let mut not_asked = Vec::new();
    for set in sets {
        asked.push(Asked::as_it_is(set));
        let material = Material {
            set: set.samples(),
            all: &all,
        };
        for probe in PROBES.iter().filter(|probe| wanted(probe.name)) {
            match probe.samples(&material) {
                Ok(mut samples) => {
                    samples.truncate(set.limit);
                    asked.push(Asked {
                        set,
                        probe: Some(probe.name),
                        samples,
                    });
                }
                Err(reason) => not_asked.push(NotAsked {
                    set: set.name.clone(),
                    probe: probe.name.to_owned(),
                    reason: reason.to_owned(),
                }),
            }
        }
    }
    (asked, not_asked)
}

/// What questions are asked of.
pub struct Asking<'a> {
    /// The untouched model.
    pub bundle: &'a Bundle,
    /// ONNX Runtime.
    pub engine: &'a Engine,
    /// What the model is weakened by.
    pub plan: &'a Plan,
    /// How answers are made and scored.
    pub settings: &'a Settings,
}

impl<'a> Asking<'a> {
    /// The model in `variant` (default: the most precise), and its decoder with every layer gated of the towers that
    /// the plan is about.
    ///
    /// # Errors
    /// The model cannot be opened, or a sample cannot be prepared.
    pub fn open(
        &self,
        variant: Option<&str>,
        asked: &[Asked<'_, '_>],
    ) -> Result<(Model<'a>, Decoder), Error> {
        let samples: usize = asked.iter().map(|asked| asked.samples.len()).sum();
        let forwards = 2 * samples.saturating_mul(self.settings.generation.limit.tokens());
        let mut model = Model::open(self.bundle, variant, self.engine, forwards)?;
        for asked in asked {
            model.check_samples(&asked.samples)?;
        }
        let gated = model.gated(self.plan.towers(), forwards)?;
        Ok((model, gated))
    }

    /// Asks everything, before and after. `variant` goes behind the names, where it is not the first that
    /// is asked. `progress` hears how many answers there are.
    ///
    /// # Errors
    /// The model fails.
    pub fn ask(
        &self,
        (model, gated): (&mut Model<'_>, &mut Decoder),
        asked: &[Asked<'_, '_>],
        variant: Option<&str>,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<EvidenceSet>, Error> {
        let mut done = 0;
        let after = gates_of(self.plan);
        let mut evaluated = Vec::with_capacity(asked.len());
        for asked in asked {
            let mut measure = |gates: &Gates| {
                let measured = evaluate(
                    &mut model.lvlm,
                    gated,
                    &asked.samples,
                    gates,
                    self.settings,
                    |n| progress(done + n),
                );
                done += asked.samples.len();
                measured
            };
            let models = [
                (Role::Before, measure(&Gates::new())?),
                (Role::After, measure(&after)?),
            ];
            let mut name = asked.set.name.clone();
            for (mark, more) in [('/', asked.probe), ('@', variant)] {
                if let Some(more) = more {
                    name.push(mark);
                    name.push_str(more);
                }
            }
            let mut entry = asked.set.entry(name, asked.samples.len(), models)?;
            entry.probe = asked.probe.map(str::to_owned);
            evaluated.push(entry);
        }
        Ok(evaluated)
    }
}
