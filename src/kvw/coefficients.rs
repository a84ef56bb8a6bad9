//! Knowledge coefficients: the mean of a moment of `h` over a set's answer tokens.

use std::collections::BTreeMap;

use ndarray::Array1;

use super::forward::{Forward, Gates, Sums};
use super::{Error, FixedSum};
use crate::graph::{LayerId, Moment};

/// The statistics of one layer over a set of samples.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCoefficients {
    /// Weighted sums of the moment, `[d_ff]`.
    pub sums: Vec<FixedSum>,
}

/// Knowledge coefficients of a set: per token, not per sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Coefficients {
    /// Which moment was summed.
    pub moment: Moment,
    /// By layer.
    pub layers: BTreeMap<LayerId, LayerCoefficients>,
    /// Sum of the token weights.
    pub weight: FixedSum,
    /// The same of layers that count other positions, see [`Sums::own_weights`].
    pub own_weights: BTreeMap<LayerId, FixedSum>,
    /// Samples that were seen.
    pub samples: u64,
}

impl Coefficients {
    /// Nothing seen yet, for the layers `layers` with their `d_ff`.
    pub fn new(moment: Moment, layers: &[(LayerId, usize)]) -> Coefficients {
        let empty = |d_ff| LayerCoefficients {
            sums: vec![FixedSum::default(); d_ff],
        };
        Coefficients {
            moment,
            layers: layers
                .iter()
                .map(|&(layer, d_ff)| (layer, empty(d_ff)))
                .collect(),
            weight: FixedSum::default(),
            own_weights: BTreeMap::new(),
            samples: 0,
        }
    }

    /// Adds the sums of `samples` samples named `names`.
    ///
    /// # Errors
    /// No answer token, a layer that is missing or of another size, a value that is not finite.
    pub fn add(&mut self, sums: &Sums, samples: u64, names: &str) -> Result<(), Error> {
        if sums.weight <= 0.0 {
            return Err(Error::NoAnswerToken {
                samples: names.to_owned(),
            });
        }
        let empty = |layer| sums.own_weights.get(layer).is_some_and(|&own| own <= 0.0);
        if self.layers.keys().all(empty) {
            return Err(Error::NoPosition {
                samples: names.to_owned(),
            });
        }
        for (&layer, total) in &mut self.layers {
            let found = sums
                .layers
                .get(&layer)
                .filter(|sum| sum.len() == total.sums.len());
            let found = found.ok_or_else(|| Error::Coefficients {
                expected: format!("layer {layer} with {} neurons", total.sums.len()),
                found: format!("{:?}", sums.layers.get(&layer).map(|sum| sum.len())),
            })?;
            for (neuron, (total, &value)) in total.sums.iter_mut().zip(found).enumerate() {
                let value = f64::from(value);
                *total = total.plus(value).ok_or_else(|| Error::NonFinite {
                    samples: names.to_owned(),
                    layer,
                    neuron,
                    found: value,
                })?;
            }
        }
        self.weight = self
            .weight
            .plus(sums.weight)
            .ok_or_else(|| Error::NoAnswerToken {
                samples: names.to_owned(),
            })?;
        for (&layer, &weight) in &sums.own_weights {
            let total = self.own_weights.entry(layer).or_default();
            *total = total.plus(weight).ok_or_else(|| Error::NoPosition {
                samples: names.to_owned(),
            })?;
        }
        self.samples += samples;
        Ok(())
    }

    /// Adds what `other` saw: the same as having seen its samples here, to the last bit.
    ///
    /// # Errors
    /// Another moment or other layers, or sums that overflow.
    pub fn merge(&mut self, other: &Coefficients) -> Result<(), Error> {
        let differ = |found: String| Error::Coefficients {
            expected: format!("the moment {:?} and the same layers", self.moment),
            found,
        };
        if self.moment != other.moment {
            return Err(differ(format!("{:?}", other.moment)));
        }
        let sizes = |layers: &BTreeMap<LayerId, LayerCoefficients>| -> Vec<(LayerId, usize)> {
            let sizes = layers.iter().map(|(&layer, sums)| (layer, sums.sums.len()));
            sizes.collect()
        };
        if sizes(&self.layers) != sizes(&other.layers) {
            return Err(differ("other layers".into()));
        }
        let overflow = || Error::Coefficients {
            expected: "sums that fit 128 bits".into(),
            found: "larger ones".into(),
        };
        for (total, more) in self.layers.values_mut().zip(other.layers.values()) {
            for (total, &more) in total.sums.iter_mut().zip(&more.sums) {
                *total = total.merge(more).ok_or_else(overflow)?;
            }
        }
        self.weight = self.weight.merge(other.weight).ok_or_else(overflow)?;
        for (&layer, &weight) in &other.own_weights {
            let total = self.own_weights.entry(layer).or_default();
            *total = total.merge(weight).ok_or_else(overflow)?;
        }
        self.samples += other.samples;
        Ok(())
    }

    /// The mean of `layer`, float64 `[d_ff]`; none where nothing of it was seen.
    pub fn mean(&self, layer: LayerId) -> Option<Array1<f64>> {
        let weight = self.own_weights.get(&layer).unwrap_or(&self.weight);
        let weight = Some(weight.value()).filter(|&weight| weight > 0.0)?;
        let layer = self.layers.get(&layer)?;
        Some(layer.sums.iter().map(|sum| sum.value() / weight).collect())
    }
}

/// Collects the coefficients of `samples` on the model as `gates` leave it, in batches of
/// `batch_size`, in order. `progress` hears how many samples are done.
///
/// # Errors
/// An empty set, and those of [`add_batch`].
pub fn collect<F: Forward>(
    forward: &mut F,
    moment: Moment,
    samples: &[F::Sample],
    gates: &Gates,
    batch_size: usize,
    mut progress: impl FnMut(usize),
) -> Result<Coefficients, Error> {
    if samples.is_empty() {
        return Err(Error::Empty { set: "retain" });
    }
    let mut coefficients = Coefficients::new(moment, &forward.layers());
    let mut done = 0;
    for batch in samples.chunks(batch_size.max(1)) {
        let batch: Vec<&F::Sample> = batch.iter().collect();
        add_batch(forward, &mut coefficients, &batch, gates)?;
        done += batch.len();
        progress(done);
    }
    Ok(coefficients)
}

/// Runs one batch and adds what was seen to `coefficients`. The sums are exact, so batches may come in any
/// order.
///
/// # Errors
/// A sample without an answer token, a non-finite activation, a model that does not run.
pub fn add_batch<F: Forward>(
    forward: &mut F,
    coefficients: &mut Coefficients,
    batch: &[&F::Sample],
    gates: &Gates,
) -> Result<(), Error> {
    let (sums, names) = run(forward, batch, gates)?;
    coefficients.add(&sums, batch.len() as u64, &names)
}

/// One forward pass, and the batch's name for messages.
pub(super) fn run<F: Forward>(
    forward: &mut F,
    batch: &[&F::Sample],
    gates: &Gates,
) -> Result<(Sums, String), Error> {
    let names: Vec<_> = batch
        .iter()
        .map(|sample| forward.sample_name(sample))
        .collect();
    let names = format!("sample {}", names.join(", "));
    let sums = forward
        .sums(batch, gates)
        .map_err(|source| Error::Forward {
            samples: names.clone(),
            source,
        })?;
    Ok((sums, names))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(values: &[[f32; 2]]) -> Coefficients {
        let mut coefficients = Coefficients::new(Moment::Absolute, &[(0.into(), 2)]);
        for value in values {
            let sums = Sums {
                layers: BTreeMap::from([(0.into(), Array1::from(value.to_vec()))]),
                weight: 3.0,
                ..Sums::default()
            };
            coefficients.add(&sums, 1, "sample").unwrap();
        }
        coefficients
    }

    #[test]
    fn merging_is_the_same_as_having_seen_everything() {
        let mut merged = seen(&[[0.1, 7.3]]);
        merged.merge(&seen(&[[0.2, 1e-7], [3.1, 0.0]])).unwrap();
        assert_eq!(merged, seen(&[[3.1, 0.0], [0.1, 7.3], [0.2, 1e-7]]));
    }

    #[test]
    fn what_does_not_belong_together_is_not_merged() {
        let mut one = seen(&[[0.1, 0.2]]);
        let other_layers = Coefficients::new(Moment::Absolute, &[(1.into(), 2)]);
        let other_moment = Coefficients::new(Moment::Square, &[(0.into(), 2)]);
        for other in [other_layers, other_moment] {
            assert!(matches!(one.merge(&other), Err(Error::Coefficients { .. })));
        }
        assert_eq!(one, seen(&[[0.1, 0.2]]));
    }
}
