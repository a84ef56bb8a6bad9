//! Runs the controls on the gated session: no file of a model is written.
//!
//! In: an open model, its gated decoder, a plan, the sets. Out: a [`Control`] each.

use std::collections::{BTreeMap, BTreeSet};

use super::people::{ByPerson, draw, split};
use super::{Error, permuted};
use crate::dataset::Sample;
use crate::eval::{Control, ControlKind, Settings, Summary, evaluate};
use crate::kvw::{Gates, Plan, Setting};
use crate::pipeline::{self, Model, gates_of};
use crate::runtime::Decoder;

/// A control that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which one.
    pub kind: ControlKind,
    /// How often.
    pub draws: usize,
}

/// Fails where a control that is `wanted` cannot be had of these sets, before anything is run.
///
/// # Errors
/// There is no retain set to draw people from, or nobody in it to draw.
pub fn check_controls(
    wanted: &[Wanted],
    forget: &[Sample],
    retain: Option<&[Sample]>,
    seed: u64,
) -> Result<(), Error> {
    for wanted in wanted {
        if wanted.kind == ControlKind::OtherPeople {
            draw(
                forget,
                retain.ok_or(Error::NoRetainSet)?,
                wanted.draws,
                seed,
            )?;
        }
    }
    Ok(())
}

/// What controls are run on.
pub struct Controls<'a, 'm> {
    /// The untouched model.
    pub model: &'a mut Model<'m>,
    /// Its decoder with every layer of the plan gated, open for [`crate::graph::Outputs::Model`].
    pub gated: &'a mut Decoder,
    /// The plan whose result is in question.
    pub plan: &'a Plan,
    /// How sets are evaluated.
    pub settings: &'a Settings,
    /// Samples of each set to evaluate.
    pub limit: usize,
    /// The seed of the draws.
    pub seed: u64,
}

impl Controls<'_, '_> {
    /// Runs what was `wanted`, on the sets forget and retain. `progress` hears of each draw that is done.
    ///
    /// # Errors
    /// As [`Controls::permuted`] and [`Controls::other_people`]; there is no retain set to draw people from.
    pub fn run(
        &mut self,
        wanted: &[Wanted],
        forget: &[Sample],
        retain: Option<&[Sample]>,
        mut progress: impl FnMut(Wanted, usize),
    ) -> Result<Vec<Control>, Error> {
        let mut controls = Vec::with_capacity(wanted.len());
        for &wanted in wanted {
            let at = |done| progress(wanted, done);
            controls.push(match wanted.kind {
                ControlKind::Permuted => {
                    let sets = [("forget", Some(forget)), ("retain", retain)];
                    let sets: Vec<_> = sets
                        .into_iter()
                        .filter_map(|(name, samples)| Some((name, samples?)))
                        .collect();
                    self.permuted(wanted.draws, &sets, at)?
                }
                ControlKind::OtherPeople => {
                    let retain = retain.ok_or(Error::NoRetainSet)?;
                    self.other_people(wanted.draws, forget, retain, at)?
                }
            });
        }
        Ok(controls)
    }

    /// `draws` times the plan's gates on other neurons, on each of `sets`. `progress` hears how many
    /// draws are done.
    ///
    /// # Errors
    /// The model fails.
    pub fn permuted(
        &mut self,
        draws: usize,
        sets: &[(&str, &[Sample])],
        mut progress: impl FnMut(usize),
    ) -> Result<Control, Error> {
        let mut drawn = Vec::with_capacity(draws);
        for (done, offset) in (0..draws as u64).enumerate() {
            let gates = permuted(self.plan, self.seed.wrapping_add(offset));
            drawn.push(self.evaluate(&gates, sets)?);
            progress(done + 1);
        }
        Ok(Control::of(ControlKind::Permuted, self.seed, &drawn))
    }

    /// `draws` times the plan's rule and options on as many people of the retain set as the forget set
    /// has, who are evaluated as `forget`; everybody else, the forget set's people included, is
    /// `retain`.
    ///
    /// # Errors
    /// There is nobody to draw, the plan does not say how it was made, or the model fails.
    pub fn other_people(
        &mut self,
        draws: usize,
        forget: &[Sample],
        retain: &[Sample],
        mut progress: impl FnMut(usize),
    ) -> Result<Control, Error> {
        let people = draw(forget, retain, draws, self.seed)?;
        let setting = Setting::of(self.plan)?;
        let steps = forget.len().saturating_mul(setting.epochs);
        let forwards = steps
            .saturating_mul(draws)
            .saturating_add(forget.len() + retain.len());
        let moment = setting.rule.moment();
        let mut weakening = self.model.measuring(setting.layers, moment, forwards)?;
        let collected = self.collect(&mut weakening, &setting, forget, retain)?;
        let norms = match setting.keep_norm {
            true => self.model.column_norms(setting.layers)?,
            false => BTreeMap::new(),
        };
        let options = setting.options(norms);
        let mut drawn = Vec::with_capacity(draws);
        for (done, people) in people.iter().enumerate() {
            let (forget, retain) = split(forget, retain, people);
            let coefficients = collected.without(people)?;
            let rule = &*setting.rule;
            let plan = self.model.weaken(
                &mut weakening,
                rule,
                &coefficients,
                &forget,
                &options,
                |_| {},
            )?;
            let sets = [("forget", forget.as_slice()), ("retain", retain.as_slice())];
            drawn.push(self.evaluate(&gates_of(&plan), &sets)?);
            progress(done + 1);
        }
        Ok(Control::of(ControlKind::OtherPeople, self.seed, &drawn))
    }

    /// The coefficients of everybody in both sets.
    fn collect(
        &mut self,
        weakening: &mut Decoder,
        setting: &Setting,
        forget: &[Sample],
        retain: &[Sample],
    ) -> Result<ByPerson, Error> {
        let mut collected = ByPerson::default();
        let names: BTreeSet<Option<&String>> = forget
            .iter()
            .chain(retain)
            .map(|sample| sample.name.as_ref())
            .collect();
        for name in names {
            let of_name = forget.iter().chain(retain);
            let samples: Vec<Sample> = of_name
                .filter(|sample| sample.name.as_ref() == name)
                .cloned()
                .collect();
            let rule = &*setting.rule;
            let seen = self.model.collect(weakening, rule, &samples, 1, |_| {})?;
            collected.add(name.cloned(), seen)?;
        }
        Ok(collected)
    }

    fn evaluate(
        &mut self,
        gates: &Gates,
        sets: &[(&str, &[Sample])],
    ) -> Result<BTreeMap<String, Summary>, Error> {
        let mut summaries = BTreeMap::new();
        for (name, samples) in sets {
            let samples = samples.get(..self.limit).unwrap_or(samples);
            let measured = evaluate(
                &mut self.model.lvlm,
                self.gated,
                samples,
                gates,
                self.settings,
                |_| {},
            );
            let measured = measured.map_err(pipeline::Error::from)?;
            summaries.insert((*name).to_owned(), measured.summary);
        }
        Ok(summaries)
    }
}
