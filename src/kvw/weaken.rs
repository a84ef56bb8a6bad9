//! The progressive loop: batch by batch, on the model as weakened so far.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use ndarray::Array1;

use super::coefficients::run;
use super::forward::{Forward, Gates};
use super::{Coefficients, Draws, Error, LayerRange, Plan, Rule, TowerChoice};
use crate::graph::LayerId;

/// In which order the forget set is gone through. Order matters: on the models measured another
/// order moved the gates of layers ≥ 1 by 8–17 %.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the file has it, the same in every epoch.
    File,
    /// A permutation drawn anew for each epoch from the seed.
    Shuffle {
        /// The seed.
        seed: u64,
    },
}

/// The loop's options. Defaults are the authors', but for γ.
#[derive(Clone, Debug)]
pub struct Options {
    /// Layers to weaken, of those that the model gives.
    pub layers: LayerRange,
    /// Samples per step.
    pub batch_size: usize,
    /// Passes over the forget set.
    pub epochs: usize,
    /// Order within an epoch.
    pub order: Order,
    /// Column norms of each layer's down projection, float64 `[d_ff]`: if given, each layer's matrix
    /// is given its old Frobenius norm back after every step. The authors leave it off.
    pub keep_norm: Option<BTreeMap<LayerId, Array1<f64>>>,
}

/// One step, as it happened.
#[derive(Clone, Debug)]
pub struct Step {
    /// Counted from 0.
    pub index: usize,
    /// Steps that the loop will take in all, if no rule asks for more.
    pub of: usize,
    /// The batch.
    pub samples: String,
    /// Token means on the batch, by weakened layer.
    pub forget: BTreeMap<LayerId, Array1<f64>>,
    /// This step's gates, by weakened layer.
    pub gates: Gates,
}

/// No rule may ask for more repeats on one batch: a stop condition that never holds must not hang.
const MAX_REPEATS: usize = 1000;

/// Weakens `forward`'s model on `samples`, and returns the cumulative gates. `watch` sees each step.
///
/// # Errors
/// Options out of range, layers that the model or the coefficients lack, an empty set, a sample
/// without an answer token, a non-finite activation or gate, and a run that changed nothing.
pub fn weaken<F: Forward>(
    forward: &mut F,
    rule: &dyn Rule,
    retain: &Coefficients,
    samples: &[F::Sample],
    options: &Options,
    mut watch: impl FnMut(&Step),
) -> Result<Plan, Error> {
    check(options, samples.len())?;
    let means = retain_means(&forward.layers(), rule, retain, options.layers)?;
    let mut cumulative: Gates = means
        .iter()
        .map(|(&layer, mean)| (layer, Array1::ones(mean.len())))
        .collect();
    let of = samples.len().div_ceil(options.batch_size) * options.epochs;
    let mut index = 0;
    for epoch in 0..options.epochs {
        for batch in options
            .order
            .indices(samples.len(), epoch)
            .chunks(options.batch_size)
        {
            let batch: Vec<&F::Sample> = batch.iter().filter_map(|&i| samples.get(i)).collect();
            for repeat in 1..=MAX_REPEATS {
                let (sums, names) = run(forward, &batch, &cumulative)?;
                let mut seen = Coefficients::new(rule.moment(), &forward.layers());
                seen.add(&sums, batch.len() as u64, &names)?;
                let forget: BTreeMap<LayerId, Array1<f64>> = means
                    .keys()
                    .filter_map(|&layer| Some((layer, seen.mean(layer)?)))
                    .collect();
                let gates = step_gates(rule, &means, &forget)?;
                fold(&mut cumulative, &gates, options.keep_norm.as_ref());
                watch(&Step {
                    index,
                    of,
                    samples: names,
                    forget,
                    gates,
                });
                index += 1;
                if !rule.again(repeat) {
                    break;
                }
            }
        }
    }
    let plan = Plan {
        gates: cumulative
            .iter()
            .map(|(&layer, gates)| (layer, gates.iter().map(|&gate| as_f32(gate)).collect()))
            .collect(),
        rule: rule.name().to_owned(),
        parameters: parameters(rule, options, means.keys().copied()),
        steps: index as u64,
    };
    if plan.gates.values().flatten().all(|&gate| gate == 1.0) {
        return Err(Error::NothingWeakened {
            steps: index,
            layers: options.layers.to_string(),
        });
    }
    Ok(plan)
}

/// Rounds to float32, the precision of gates in files and graphs.
#[allow(clippy::cast_possible_truncation)]
fn as_f32(value: f64) -> f32 {
    value as f32
}

fn check(options: &Options, samples: usize) -> Result<(), Error> {
    let positive = |option, value: usize| match value {
        0 => Err(Error::Option {
            option,
            expected: "a number ≥ 1",
            found: "0".into(),
        }),
        _ => Ok(()),
    };
    positive("batch size", options.batch_size)?;
    positive("epochs", options.epochs)?;
    match samples {
        0 => Err(Error::Empty { set: "forget" }),
        _ => Ok(()),
    }
}

/// The retain means of the layers to weaken, checked against the model.
fn retain_means(
    layers: &[(LayerId, usize)],
    rule: &dyn Rule,
    retain: &Coefficients,
    range: LayerRange,
) -> Result<BTreeMap<LayerId, Array1<f64>>, Error> {
    let found = layers.iter().map(|&(layer, _)| layer);
    range.check(found).map_err(|found| Error::NoSuchLayer {
        requested: range.to_string(),
        found,
    })?;
    if retain.moment != rule.moment() {
        return Err(Error::Coefficients {
            expected: format!("the moment {:?}", rule.moment()),
            found: format!("{:?}", retain.moment),
        });
    }
    layers
        .iter()
        .filter(|(layer, _)| range.contains(*layer))
        .map(|&(layer, d_ff)| {
            let mean = retain.mean(layer).filter(|mean| mean.len() == d_ff);
            let mean = mean.ok_or_else(|| Error::Coefficients {
                expected: format!("layer {layer} with {d_ff} neurons"),
                found: match retain.layers.get(&layer) {
                    Some(found) if found.sums.len() == d_ff => {
                        "no position of it: no sample has an image".into()
                    }
                    Some(found) => format!("{} neurons", found.sums.len()),
                    None => "no such layer".into(),
                },
            })?;
            Ok((layer, mean))
        })
        .collect()
}

fn step_gates(
    rule: &dyn Rule,
    retain: &BTreeMap<LayerId, Array1<f64>>,
    forget: &BTreeMap<LayerId, Array1<f64>>,
) -> Result<Gates, Error> {
    let mut step = Gates::new();
    for (&layer, forget) in forget {
        let Some(retain) = retain.get(&layer) else {
            continue;
        };
        let gates = rule.gates(layer, forget.view(), retain.view());
        let bad = gates.iter().enumerate().find(|(_, gate)| !gate.is_finite());
        if let Some((neuron, &found)) = bad {
            return Err(Error::BadGate {
                layer,
                neuron,
                found,
            });
        }
        step.insert(layer, gates);
    }
    Ok(step)
}

/// Multiplies `step` into `cumulative`; with column norms `n`, then by the layer's
/// `‖W‖ / ‖W·diag(g)‖ = √(Σ n² / Σ g²n²)`.
fn fold(cumulative: &mut Gates, step: &Gates, norms: Option<&BTreeMap<LayerId, Array1<f64>>>) {
    for (layer, gates) in cumulative.iter_mut() {
        if let Some(step) = step.get(layer) {
            *gates *= step;
        }
        if let Some(norms) = norms.and_then(|norms| norms.get(layer)) {
            let squares = norms * norms;
            let kept = (&*gates * &*gates * &squares).sum();
            if kept > 0.0 {
                *gates *= (squares.sum() / kept).sqrt();
            }
        }
    }
}

fn parameters(
    rule: &dyn Rule,
    options: &Options,
    layers: impl Iterator<Item = LayerId>,
) -> serde_json::Value {
    let mut parameters = rule.parameters();
    if let Some(map) = parameters.as_object_mut() {
        let towers = TowerChoice::of(layers);
        if towers != TowerChoice::default() {
            map.insert("tower".into(), towers.to_string().into());
        }
        map.insert("layers".into(), options.layers.to_string().into());
        map.insert("batch_size".into(), options.batch_size.into());
        map.insert("epochs".into(), options.epochs.into());
        map.insert("order".into(), options.order.to_string().into());
        if let Order::Shuffle { seed } = options.order {
            map.insert("seed".into(), seed.into());
        }
        map.insert("keep_norm".into(), options.keep_norm.is_some().into());
    }
    parameters
}

impl Order {
    /// The sample indices of one epoch, counted from 0.
    pub fn indices(self, samples: usize, epoch: usize) -> Vec<usize> {
        match self {
            Order::File => (0..samples).collect(),
            Order::Shuffle { seed } => {
                let of_epoch = (epoch as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
                Draws::new(seed.wrapping_add(of_epoch)).permutation(samples)
            }
        }
    }
}

impl FromStr for Order {
    type Err = String;

    /// `file`, or `shuffle` (with seed 0: the seed is an option of its own).
    fn from_str(text: &str) -> Result<Order, String> {
        match text {
            "file" => Ok(Order::File),
            "shuffle" => Ok(Order::Shuffle { seed: 0 }),
            _ => Err(format!("expected 'file' or 'shuffle', found '{text}'")),
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Order::File => "file",
            Order::Shuffle { .. } => "shuffle",
        })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, array};

    use super::*;
    use crate::graph::Moment;
    use crate::kvw::{KnowledgeVectorWeakening, Sums, collect};

    /// Two layers of which the second reads the first through a weight matrix, in closed form:
    /// h₀ = |x|, h₁ = |M · (g₀ ⊙ h₀)|.
    struct Linear {
        mixing: Array2<f64>,
        forwards: usize,
    }

    struct Input {
        name: String,
        x: Array1<f64>,
        tokens: f64,
    }

    impl Forward for Linear {
        type Sample = Input;

        fn layers(&self) -> Vec<(LayerId, usize)> {
            vec![(0.into(), 3), (1.into(), 3)]
        }

        fn sample_name(&self, sample: &Input) -> String {
            sample.name.to_string()
        }

        fn sums(
            &mut self,
            batch: &[&Input],
            gates: &Gates,
        ) -> Result<Sums, Box<dyn std::error::Error + Send + Sync>> {
            self.forwards += 1;
            let mut sums = [Array1::<f64>::zeros(3), Array1::zeros(3)];
            let mut weight = 0.0;
            for input in batch {
                let hidden = input.x.mapv(f64::abs);
                let gated = gates
                    .get(&0.into())
                    .map_or(hidden.clone(), |gates| &hidden * gates);
                sums[0] = &sums[0] + &(&hidden * input.tokens);
                sums[1] = &sums[1] + &(self.mixing.dot(&gated).mapv(f64::abs) * input.tokens);
                weight += input.tokens;
            }
            #[allow(clippy::cast_possible_truncation)]
            let layers = sums
                .into_iter()
                .map(|sum| sum.mapv(|v| v as f32))
                .enumerate()
                .map(|(layer, sum)| (layer.into(), sum))
                .collect();
            Ok(Sums {
                layers,
                weight,
                ..Sums::default()
            })
        }
    }

    fn model() -> Linear {
        Linear {
            mixing: array![[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.5, 0.0, 1.0]],
            forwards: 0,
        }
    }

    fn input(name: &str, x: [f64; 3]) -> Input {
        Input {
            name: name.into(),
            x: Array1::from(x.to_vec()),
            tokens: 4.0,
        }
    }

    fn options() -> Options {
        Options {
            layers: LayerRange::All,
            batch_size: 1,
            epochs: 1,
            order: Order::File,
            keep_norm: None,
        }
    }

    const RULE: KnowledgeVectorWeakening = KnowledgeVectorWeakening { gamma: 1.0 };

    fn retain(model: &mut Linear) -> Coefficients {
        let samples = [input("r", [1.0, 1.0, 1.0])];
        collect(model, Moment::Absolute, &samples, &Gates::new(), 1, |_| {}).unwrap()
    }

    #[test]
    fn effects_compound_over_batches() {
        let mut model = model();
        let retain = retain(&mut model);
        model.forwards = 0;
        // Retain means are [1,1,1] and [1.5,1.5,1.5]. Neuron 0 of layer 0 fires twice as much: γ = 1
        // halves it. Layer 1 sees [2,1,1]: means [2.5, 1.5, 2.0], gates [1.5/2.5, 1, 1.5/2].
        let samples = [input("a", [2.0, 1.0, 1.0]), input("b", [2.0, 1.0, 1.0])];
        let plan = weaken(&mut model, &RULE, &retain, &samples, &options(), |_| {}).unwrap();
        let close = |a: f32, b: f64| (f64::from(a) - b).abs() < 1e-6;
        // Second step: layer 0 is read before its gate, so it halves again.
        assert!(close(plan.gates[&LayerId::language(0)][0], 0.25));
        // Layer 1 now sees [1,1,1] through the gate of layer 0: nothing more to weaken.
        assert!(close(plan.gates[&LayerId::language(1)][0], 1.5 / 2.5));
        assert!(close(plan.gates[&LayerId::language(1)][2], 1.5 / 2.0));
        assert_eq!(plan.gates[&LayerId::language(1)][1], 1.0);
        assert_eq!(model.forwards, 2, "a step is one forward pass");
    }

    #[test]
    fn layers_outside_the_range_get_no_gate() {
        let mut model = model();
        let retain = retain(&mut model);
        let options = Options {
            layers: LayerRange::Inclusive { start: 1, end: 1 },
            ..options()
        };
        let samples = [input("a", [2.0, 1.0, 1.0])];
        let plan = weaken(&mut model, &RULE, &retain, &samples, &options, |_| {}).unwrap();
        assert_eq!(plan.gates.keys().copied().collect::<Vec<_>>(), [1.into()]);
    }

    #[test]
    fn a_run_that_changes_nothing_fails() {
        let mut model = model();
        let retain = retain(&mut model);
        let samples = [input("a", [1.0, 1.0, 1.0])];
        let result = weaken(&mut model, &RULE, &retain, &samples, &options(), |_| {});
        assert!(matches!(
            result,
            Err(Error::NothingWeakened { steps: 1, .. })
        ));
    }

    #[test]
    fn a_sample_without_answer_tokens_fails() {
        let mut model = model();
        let retain = retain(&mut model);
        let samples = [Input {
            tokens: 0.0,
            ..input("mute", [2.0, 1.0, 1.0])
        }];
        let error = weaken(&mut model, &RULE, &retain, &samples, &options(), |_| {}).unwrap_err();
        assert!(matches!(&error, Error::NoAnswerToken { samples } if samples.contains("mute")));
    }

    #[test]
    fn a_non_finite_activation_fails_and_is_named() {
        let mut model = model();
        let retain = retain(&mut model);
        let samples = [input("inf", [f64::INFINITY, 1.0, 1.0])];
        let error = weaken(&mut model, &RULE, &retain, &samples, &options(), |_| {}).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NonFinite {
                    layer,
                    neuron: 0,
                    ..
                } if layer == LayerId::language(0)
            ),
            "{error}"
        );
    }

    #[test]
    fn a_layer_that_the_model_lacks_is_refused() {
        let mut model = model();
        let retain = retain(&mut model);
        let options = Options {
            layers: LayerRange::Inclusive { start: 1, end: 25 },
            ..options()
        };
        let samples = [input("a", [2.0, 1.0, 1.0])];
        let error = weaken(&mut model, &RULE, &retain, &samples, &options, |_| {}).unwrap_err();
        assert!(error.to_string().contains("1-25"), "{error}");
    }

    #[test]
    fn keeping_the_norm_keeps_it() {
        let mut model = model();
        let retain = retain(&mut model);
        let norms = array![3.0, 1.0, 2.0];
        let keep_norm = Some([(0.into(), norms.clone()), (1.into(), norms.clone())].into());
        let options = Options {
            keep_norm,
            ..options()
        };
        let samples = [input("a", [2.0, 1.0, 1.0])];
        let plan = weaken(&mut model, &RULE, &retain, &samples, &options, |_| {}).unwrap();
        let gates: Array1<f64> = plan.gates[&LayerId::language(0)]
            .iter()
            .map(|&g| f64::from(g))
            .collect();
        let after = (&gates * &norms).mapv(|v| v * v).sum();
        assert!((after - norms.mapv(|v| v * v).sum()).abs() < 1e-5);
        assert!(gates[0] < gates[1]);
    }

    #[test]
    fn a_seed_is_one_permutation() {
        let shuffled = Order::Shuffle { seed: 7 }.indices(10, 0);
        assert_eq!(shuffled, Order::Shuffle { seed: 7 }.indices(10, 0));
        assert_ne!(shuffled, Order::Shuffle { seed: 8 }.indices(10, 0));
        assert_ne!(shuffled, Order::Shuffle { seed: 7 }.indices(10, 1));
        let mut sorted = shuffled;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
}
