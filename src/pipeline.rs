//! The whole job, in the order in which it is done: what every verb is made of.
//!
//! ```text
//!   open ──► collect ──► weaken ──► apply ──► verify ──► evaluate
//!   model    KC_retain   plan       folder    edited =    before, after
//!                                             gated?
//! ```
//!
//! In: a [`Bundle`], an [`Engine`], datasets, options. Out: coefficients, a plan, a written folder, an
//! evaluation. Nothing here knows a command line, and nothing here prints.

pub mod collect;

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::{Array1, Axis};

use crate::bundle::{Bundle, OnnxFile, check_one_model};
use crate::dataset::{Dataset, Sample};
use crate::edit::{self, ModelIdentity};
use crate::eval::Agreement;
use crate::graph::{Index, LayerId, Mlp, Moment, Outputs, Tower};
use crate::kvw::{self, Gates, Layers, Plan, TowerChoice};
use crate::onnx::{Limits, ModelFile};
use crate::preprocess::{self, Form, open_family};
use crate::runtime::{self, Collector, Decoder, Engine, Lvlm, Towers, Window, Work};

/// Why a job failed. Each variant is the error of the part that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    Bundle(#[from] crate::bundle::Error),
    #[error(transparent)]
    Dataset(#[from] crate::dataset::Error),
    #[error(transparent)]
    Edit(#[from] edit::Error),
    #[error(transparent)]
    Eval(#[from] crate::eval::Error),
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    #[error(transparent)]
    Graph(#[from] crate::graph::Error),
    #[error(transparent)]
    Kvw(#[from] kvw::Error),
    #[error(transparent)]
    Onnx(#[from] crate::onnx::Error),
    #[error(transparent)]
    Preprocess(#[from] crate::preprocess::Error),
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// One file as both sets.
    #[error("{}: expected a retain set that differs from the forget set, found the same file", path.display())]
    SameSet {
        /// The file.
        path: std::path::PathBuf,
    },
    /// Norms were asked for of a matrix that is stored quantized.
    #[error("layer {layer}: expected a float down projection to keep the norm of, found another")]
    NoNorms {
        /// Decoder layer.
        layer: LayerId,
    },
    /// A file of coefficients or gates that was made for another model.
    #[error("{} was made for another model", path.display())]
    OtherModel {
        /// The file.
        path: std::path::PathBuf,
        /// What differs.
        source: edit::Mismatch,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Bundle(error) => error.hint(),
            Error::Dataset(error) => error.hint(),
            Error::Edit(error) => error.hint(),
            Error::Eval(error) => error.hint(),
            Error::Files(error) => error.hint(),
            Error::Graph(error) => error.hint(),
            Error::Kvw(error) => error.hint(),
            Error::Onnx(error) => error.hint(),
            Error::Preprocess(error) => error.hint(),
            Error::Runtime(error) => error.hint(),
            Error::NoNorms { .. } => Some("leave out --keep-norm".into()),
            Error::SameSet { .. } => {
                Some("the retain set holds what must be kept, and nothing of the forget set".into())
            }
            Error::OtherModel { .. } => Some("collect and weaken again, on this model".into()),
        }
    }
}

/// An open model: preprocessing, towers, and the decoder file that sessions are made from.
pub struct Model<'a> {
    bundle: &'a Bundle,
    decoder_file: &'a OnnxFile,
    model: ModelFile,
    /// The decoder of further tokens, where it is a file of its own.
    decode: Option<(&'a OnnxFile, ModelFile)>,
    lm_head: Option<ModelFile>,
    /// The vision encoder, where it is a file of its own.
    vision: Option<(&'a OnnxFile, ModelFile)>,
    engine: &'a Engine,
    /// Preprocessing and towers.
    pub lvlm: Lvlm,
}

impl<'a> Model<'a> {
    /// Opens the model in `bundle`, its decoder in `variant` (default: the most precise), for about
    /// `forwards` forward passes.
    ///
    /// # Errors
    /// A file is missing, damaged or not what its role asks for.
    pub fn open(
        bundle: &'a Bundle,
        variant: Option<&str>,
        engine: &'a Engine,
        forwards: usize,
    ) -> Result<Model<'a>, Error> {
        let components = bundle.components(variant)?;
        let open = |file: &OnnxFile| ModelFile::open(&file.path, &Limits::default());
        let model = open(components.decoder)?;
        let decode = components.decode.map(|file| Ok((file, open(file)?)));
        let decode = decode.transpose().map_err(Error::Onnx)?;
        let lm_head = components.lm_head.map(open).transpose()?;
        let embed_tokens = components.embed_tokens.map(open).transpose()?;
        let vision = components
            .vision_encoder
            .map(|file| Ok((file, open(file)?)));
        let vision = vision.transpose().map_err(Error::Onnx)?;
        let together = [
            Some((components.decoder, &model)),
            decode.as_ref().map(|(file, model)| (*file, model)),
            components.lm_head.zip(lm_head.as_ref()),
            components.embed_tokens.zip(embed_tokens.as_ref()),
        ];
        let together: Vec<_> = together.into_iter().flatten().collect();
        check_one_model(bundle, &together)?;
        let takes = |name: &str| model.graph().input.iter().any(|input| input.name() == name);
        let embedded = takes(&bundle.decoder_names().inputs_embeds);
        let family = match embedded && components.embed_tokens.is_none() {
            true => Err(preprocess::Error::NoEmbedding {
                dir: bundle.folder().to_owned(),
            }),
            false => open_family(bundle.folder()),
        };
        let image_token_id = family.as_ref().ok().and_then(|f| f.image_token_id());
        let towers = Towers::open(
            engine,
            components.vision_encoder.map(|file| file.path.as_path()),
            components.embed_tokens.map(|file| file.path.as_path()),
            image_token_id,
            Work::Forwards(forwards),
        )?
        .with_decoder_inputs(
            model
                .graph()
                .input
                .iter()
                .map(|input| input.name().to_owned())
                .collect(),
        );
        Ok(Model {
            bundle,
            decoder_file: components.decoder,
            model,
            decode,
            lm_head,
            vision,
            engine,
            lvlm: Lvlm::new(family, towers),
        })
    }

    /// The decoder file that is run, relative to the model folder.
    pub fn decoder_path(&self) -> &str {
        &self.decoder_file.relative
    }

    /// What plans and coefficients made on this model's language model will be bound to.
    ///
    /// # Errors
    /// A weight cannot be read.
    pub fn identity(&self) -> Result<ModelIdentity, Error> {
        self.identity_of(TowerChoice::Language)
    }

    /// The same of these towers.
    ///
    /// # Errors
    /// A weight cannot be read.
    pub fn identity_of(&self, towers: TowerChoice) -> Result<ModelIdentity, Error> {
        let mut whole = ModelIdentity { layers: Vec::new() };
        for part in self.with_mlps(Layers::all_of(towers), |model, mlps| {
            edit::identity(model, &mlps.into_iter().cloned().collect::<Vec<_>>())
        }) {
            whole = whole.and(part?);
        }
        Ok(whole)
    }

    /// Opens what coefficients of `layers` are measured on: the decoder, and where layers of it are asked
    /// for the vision encoder, for about `forwards` forward passes.
    ///
    /// # Errors
    /// As [`Model::decoder`].
    pub fn measuring(
        &mut self,
        layers: impl Into<Layers>,
        moment: Moment,
        forwards: usize,
    ) -> Result<Decoder, Error> {
        self.measuring_as(layers.into(), Outputs::Sums(moment), moment, forwards)
    }

    /// As [`Model::measuring`], for one batch of 1 after the other of which many in a row are about the same
    /// picture: what they begin with is run once. See [`Outputs::SumsAndCache`].
    ///
    /// # Errors
    /// As [`Model::decoder`], and a decoder that keeps no keys and values.
    pub fn measuring_with_prefixes(
        &mut self,
        layers: impl Into<Layers>,
        moment: Moment,
        forwards: usize,
    ) -> Result<Decoder, Error> {
        self.measuring_as(
            layers.into(),
            Outputs::SumsAndCache(moment),
            moment,
            forwards,
        )
    }

    fn measuring_as(
        &mut self,
        layers: Layers,
        outputs: Outputs,
        moment: Moment,
        forwards: usize,
    ) -> Result<Decoder, Error> {
        self.instrument_vision(layers, Outputs::ModelAndSums(moment), forwards)?;
        self.decoder(layers, outputs, forwards)
    }

    /// Encodes the pictures of `samples` and closes the vision encoder before the decoder is opened, where
    /// `towers` leaves it as it is and the features take little. A job of other samples too must not do this.
    ///
    /// # Errors
    /// The first sample that cannot be prepared or encoded.
    pub fn encode_first(&mut self, towers: TowerChoice, samples: &[Sample]) -> Result<(), Error> {
        if towers.contains(Tower::Vision) {
            return Ok(());
        }
        let closed = self.lvlm.encode_and_close(samples);
        let closed = closed.map_err(not_embedded(samples))?;
        tracing::debug!(closed, "encoded the pictures before the decoder is opened");
        Ok(())
    }

    /// Opens what answers under gates: every layer of `towers` is gated.
    ///
    /// # Errors
    /// As [`Model::decoder`].
    pub fn gated(&mut self, towers: TowerChoice, forwards: usize) -> Result<Decoder, Error> {
        let layers = Layers::all_of(towers);
        self.instrument_vision(layers, Outputs::Model, forwards)?;
        self.decoder(layers, Outputs::Model, forwards)
    }

    /// Opens the vision encoder's file with its layers of `layers` gated, and summed where `outputs` asks
    /// for it. Nothing is done where none is asked for, or where they are in the decoder's graph.
    fn instrument_vision(
        &mut self,
        layers: Layers,
        outputs: Outputs,
        forwards: usize,
    ) -> Result<(), Error> {
        if !layers.towers.contains(Tower::Vision) {
            return Ok(());
        }
        let Some((file, model)) = &self.vision else {
            return Ok(());
        };
        let layers = Layers {
            towers: TowerChoice::Vision,
            ..layers
        };
        let index = Index::new(model.graph());
        let mlps = edit::mlps(self.bundle, file, &index);
        edit::check_vision(file, &index, &mlps)?;
        check_range(layers, &mlps)?;
        let mlps = of_layers(&mlps, layers);
        let work = Work::Forwards(forwards);
        let towers = &mut self.lvlm.towers;
        Ok(towers.instrument(self.engine, model, &mlps, outputs, work)?)
    }

    /// Those of `layers` that are in the decoder's graph.
    fn in_decoder(&self, layers: Layers) -> Option<Layers> {
        let towers = match (layers.towers, &self.vision) {
            (TowerChoice::Vision, Some(_)) => return None,
            (TowerChoice::All, Some(_)) => TowerChoice::Language,
            (towers, _) => towers,
        };
        Some(Layers { towers, ..layers })
    }

    /// The layers that `decoder` and the vision encoder are open for, each with its `d_ff`.
    pub fn layers(&self, decoder: &Decoder) -> Vec<(LayerId, usize)> {
        let mut layers = decoder.layers().to_vec();
        layers.extend(self.lvlm.towers.layers());
        layers
    }

    /// Opens a decoder session with those of the layers `layers` tapped and gated that are in its graph. If
    /// none is, it is the model as it is.
    ///
    /// # Errors
    /// The layers are not those of the configuration, one cannot be instrumented, or ONNX Runtime
    /// refuses the model.
    pub fn decoder(
        &self,
        layers: impl Into<Layers>,
        outputs: Outputs,
        forwards: usize,
    ) -> Result<Decoder, Error> {
        let layers = layers.into();
        let work = Work::Forwards(forwards);
        let index = Index::new(self.model.graph());
        let mlps = edit::mlps(self.bundle, self.decoder_file, &index);
        let Some(layers) = self.in_decoder(layers) else {
            return match outputs {
                Outputs::Model => self.plain_decoder(forwards),
                // It will not be run.
                _ => self.plain_decoder(0),
            };
        };
        if layers.towers.contains(Tower::Language) {
            edit::check_layers(self.bundle, self.decoder_file, &index, &mlps)?;
        }
        if layers.towers.contains(Tower::Vision) {
            edit::check_vision(self.decoder_file, &index, &mlps)?;
        }
        check_range(layers, &mlps)?;
        let decoder = Decoder::open_named(
            self.engine,
            self.bundle.decoder_names().clone(),
            &self.model,
            &of_layers(&mlps, layers),
            outputs,
            work,
        )?;
        if outputs != Outputs::Model {
            return Ok(decoder);
        }
        self.completed(decoder, Some(layers), work)
    }

    /// Adds the files that generating needs, the decoder of further tokens gated like `decoder`.
    fn completed(
        &self,
        mut decoder: Decoder,
        layers: Option<Layers>,
        work: Work,
    ) -> Result<Decoder, Error> {
        if let Some((file, model)) = &self.decode {
            let index = Index::new(model.graph());
            let mlps = edit::mlps(self.bundle, file, &index);
            edit::check_layers(self.bundle, file, &index, &mlps)?;
            let mlps = layers.map_or_else(Vec::new, |layers| of_layers(&mlps, layers));
            decoder = decoder.with_decode(self.engine, model, &mlps, work)?;
        }
        if let Some(model) = &self.lm_head {
            decoder = decoder.with_lm_head(self.engine, model, work)?;
        }
        Ok(decoder)
    }

    /// The model as it is: no layer tapped, no gate, its own outputs.
    ///
    /// # Errors
    /// ONNX Runtime refuses the model.
    pub fn plain_decoder(&self, forwards: usize) -> Result<Decoder, Error> {
        let work = Work::Forwards(forwards);
        let decoder = Decoder::open_named(
            self.engine,
            self.bundle.decoder_names().clone(),
            &self.model,
            &[],
            Outputs::Model,
            work,
        )?;
        self.completed(decoder, None, work)
    }

    /// Norms of the knowledge vectors of each down projection, float64 `[d_ff]` by layer.
    ///
    /// # Errors
    /// A weight is not a float matrix, or cannot be read.
    pub fn column_norms(
        &self,
        layers: impl Into<Layers>,
    ) -> Result<BTreeMap<LayerId, Array1<f64>>, Error> {
        let mut all = BTreeMap::new();
        for norms in self.with_mlps(layers.into(), |model, mlps| {
            let mut norms = Vec::new();
            for mlp in mlps {
                let Some(layer) = mlp.id() else { continue };
                let found = edit::column_norms(model, mlp)?;
                norms.push((layer, found.ok_or(Error::NoNorms { layer })?));
            }
            Ok::<_, Error>(norms)
        }) {
            all.extend(norms?);
        }
        Ok(all)
    }

    /// Calls `f` with the MLPs of the layers `layers`, those of the decoder's file and those of the vision
    /// encoder's, where there are any.
    fn with_mlps<T>(&self, layers: Layers, f: impl Fn(&ModelFile, Vec<&Mlp<'_>>) -> T) -> Vec<T> {
        let decoder = (self.decoder_file, &self.model);
        let vision = self.vision.as_ref().map(|(file, model)| (*file, model));
        let mut all = Vec::new();
        for (file, model) in [decoder].into_iter().chain(vision) {
            let index = Index::new(model.graph());
            let mlps = edit::mlps(self.bundle, file, &index);
            let mlps = of_layers(&mlps, layers);
            if !mlps.is_empty() {
                all.push(f(model, mlps));
            }
        }
        all
    }

    /// Prepares every sample and forgets the result: an answer that the template changes or an image
    /// that cannot be read shows before any work is done.
    ///
    /// # Errors
    /// The first sample that cannot be prepared.
    pub fn check_samples(&self, samples: &[Sample]) -> Result<(), Error> {
        use rayon::prelude::*;
        samples
            .par_iter()
            .try_for_each(|sample| self.lvlm.check(sample))?;
        Ok(())
    }

    /// The knowledge coefficients of `samples` on the untouched model: the statistics that `rule` wants.
    ///
    /// # Errors
    /// An empty set, and those of [`Model::collect_more`].
    pub fn collect(
        &mut self,
        decoder: &mut Decoder,
        rule: &dyn kvw::Rule,
        samples: &[Sample],
        batch_size: usize,
        mut progress: impl FnMut(usize),
    ) -> Result<kvw::Coefficients, Error> {
        if samples.is_empty() {
            return Err(kvw::Error::Empty { set: "retain" }.into());
        }
        let empty = kvw::Coefficients::new(rule.moment(), &self.layers(decoder));
        let mut done = 0;
        self.collect_more(decoder, rule, empty, samples, batch_size, |_, samples| {
            done += samples;
            progress(done);
            Ok(())
        })
    }

    /// Adds `samples` to `coefficients`, on the untouched model. `watch` sees the sums after every
    /// [`window`](collect::window) of samples: within it, those of similar length are run together. While
    /// the model runs, the next samples are prepared.
    ///
    /// # Errors
    /// A sample that cannot be prepared or has no answer token, a non-finite activation, a model that
    /// does not run, or what `watch` returns.
    pub fn collect_more(
        &mut self,
        decoder: &mut Decoder,
        rule: &dyn kvw::Rule,
        mut coefficients: kvw::Coefficients,
        samples: &[Sample],
        batch_size: usize,
        mut watch: impl FnMut(&kvw::Coefficients, usize) -> Result<(), kvw::Error>,
    ) -> Result<kvw::Coefficients, Error> {
        self.lvlm.weights = rule.token_weights();
        let order: Vec<&Sample> = samples.iter().collect();
        let none = Gates::new();
        self.lvlm.ahead(&order, |source| {
            for samples in samples.chunks(collect::window(batch_size)) {
                let mut window =
                    Window::open(source, samples, &none).map_err(not_embedded(samples))?;
                let by_length = window.by_length();
                let mut forward = Collector {
                    source: &mut window,
                    decoder,
                };
                for batch in by_length.chunks(batch_size.max(1)) {
                    kvw::add_batch(&mut forward, &mut coefficients, batch, &none)?;
                }
                watch(&coefficients, samples.len())?;
            }
            Ok(coefficients)
        })
    }

    /// The progressive weakening of `samples`.
    ///
    /// # Errors
    /// See [`kvw::weaken()`].
    pub fn weaken(
        &mut self,
        decoder: &mut Decoder,
        rule: &dyn kvw::Rule,
        retain: &kvw::Coefficients,
        samples: &[Sample],
        options: &kvw::Options,
        watch: impl FnMut(&kvw::Step),
    ) -> Result<Plan, Error> {
        self.lvlm.weights = rule.token_weights();
        let order =
            (0..options.epochs).flat_map(|epoch| options.order.indices(samples.len(), epoch));
        let order: Vec<&Sample> = order.filter_map(|index| samples.get(index)).collect();
        self.lvlm.ahead(&order, |source| {
            let mut forward = Collector { source, decoder };
            Ok(kvw::weaken(
                &mut forward,
                rule,
                retain,
                samples,
                options,
                watch,
            )?)
        })
    }
}

/// The error of a sample that could not be embedded, with the sample's name.
fn not_embedded(samples: &[Sample]) -> impl Fn((usize, runtime::Error)) -> kvw::Error {
    move |(index, error)| kvw::Error::Forward {
        samples: format!(
            "sample {}",
            samples.get(index).map_or_else(String::new, Sample::called)
        ),
        source: Box::new(error),
    }
}

/// The MLPs of the layers `layers`.
fn of_layers<'s, 'm>(mlps: &'s [Mlp<'m>], layers: Layers) -> Vec<&'s Mlp<'m>> {
    mlps.iter()
        .filter(|mlp| mlp.id().is_some_and(|layer| layers.contains(layer)))
        .collect()
}

/// Refuses a range that reaches past a chosen tower's layers: nobody asked for a part of it.
fn check_range(layers: Layers, mlps: &[Mlp<'_>]) -> Result<(), kvw::Error> {
    let chosen = Layers::all_of(layers.towers);
    let found = of_layers(mlps, chosen);
    match layers.range.check(found.into_iter().filter_map(Mlp::id)) {
        Ok(()) => Ok(()),
        Err(found) => Err(kvw::Error::NoSuchLayer {
            requested: layers.range.to_string(),
            found,
        }),
    }
}

/// Runs the `edited` model and the original with `gates` as inputs on `samples`, and compares logits:
/// the same within the rounding of the stored weights, or the edit is wrong.
///
/// # Errors
/// A model fails.
pub fn compare(
    original: &mut Model<'_>,
    gated: &mut Decoder,
    gates: &Gates,
    (edited_lvlm, edited): (&mut Lvlm, &mut Decoder),
    samples: &[Sample],
) -> Result<Agreement, Error> {
    let towers = TowerChoice::of(original.layers(gated).into_iter().map(|(layer, _)| layer));
    let tolerances = original.with_mlps(Layers::all_of(towers), |model, mlps| {
        edit::tolerance(model, &mlps)
    });
    let mut agreement = Agreement {
        max_difference: 0.0,
        effect: 0.0,
        max_logit: 0.0,
        same_argmax: 0.0,
        positions: 0,
        tolerance: tolerances.into_iter().fold(0.0, f64::max),
    };
    let mut same = 0usize;
    let none = Gates::new();
    for sample in samples {
        let lvlm = &mut original.lvlm;
        let embedded = lvlm.embed_as(sample, Form::WithAnswer, gates)?;
        let expected = gated.logits(&embedded, gates)?;
        let embedded = lvlm.embed_as(sample, Form::WithAnswer, &none)?;
        let untouched = gated.logits(&embedded, &none)?;
        let embedded = edited_lvlm.embed_as(sample, Form::WithAnswer, &none)?;
        let found = edited.logits(&embedded, &none)?;
        let moved = expected.iter().zip(&untouched);
        agreement.effect = moved
            .map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs())
            .fold(agreement.effect, f64::max);
        for (expected, found) in expected.axis_iter(Axis(0)).zip(found.axis_iter(Axis(0))) {
            let mut best = [(0, f32::NEG_INFINITY); 2];
            for (id, (&a, &b)) in expected.iter().zip(found).enumerate() {
                let difference = (f64::from(a) - f64::from(b)).abs();
                // A NaN on one side only must not pass as equal.
                agreement.max_difference = if difference.is_nan() {
                    f64::INFINITY
                } else {
                    agreement.max_difference.max(difference)
                };
                agreement.max_logit = agreement.max_logit.max(f64::from(a).abs());
                for (best, value) in best.iter_mut().zip([a, b]) {
                    if value > best.1 {
                        *best = (id, value);
                    }
                }
            }
            same += usize::from(best[0].0 == best[1].0);
            agreement.positions += 1;
        }
    }
    agreement.same_argmax = same as f64 / agreement.positions.max(1) as f64;
    Ok(agreement)
}

/// Fails where both sets are the same file: what is to be kept is not what is to be forgotten.
///
/// # Errors
/// [`Error::SameSet`].
pub fn check_different(forget: &Dataset, retain: &Dataset) -> Result<(), Error> {
    match retain.sha256 == forget.sha256 {
        true => Err(Error::SameSet {
            path: retain.path.clone(),
        }),
        false => Ok(()),
    }
}

/// The provenance object of coefficients and plans.
///
/// # Errors
/// An image of the dataset cannot be read.
pub fn provenance(
    model: &Model<'_>,
    identity: &ModelIdentity,
    engine: &Engine,
    data: &[(&str, &Dataset)],
) -> Result<serde_json::Value, Error> {
    let mut sets = serde_json::Map::new();
    for (name, dataset) in data {
        let digest = dataset.content_sha256()?;
        let mut set = serde_json::json!({
            "file": dataset.path.file_name().map(|name| name.to_string_lossy()),
            "samples": dataset.samples.len(),
            "sha256": digest,
        });
        let left_out = dataset.left_out();
        if !left_out.is_empty() {
            set["left_out"] = serde_json::json!(left_out);
        }
        sets.insert((*name).to_owned(), set);
    }
    Ok(serde_json::json!({
        "model": identity,
        "family": model.bundle.family(),
        "decoder": model.decoder_path(),
        "data": sets,
        "runtime": engine.describe(),
    }))
}

/// Checks that the file `path`, with this provenance, was made for the model of `identity`.
///
/// # Errors
/// It was not, or does not say.
pub fn check_identity(
    path: &Path,
    provenance: &serde_json::Value,
    identity: &ModelIdentity,
) -> Result<(), Error> {
    let expected = edit::identity_in(path, provenance)?;
    edit::check(&expected, identity)
        .map(|_| ())
        .map_err(|source| Error::OtherModel {
            path: path.to_owned(),
            source,
        })
}

/// Gates as the decoder takes them.
pub fn gates_of(plan: &Plan) -> Gates {
    plan.gates
        .iter()
        .map(|(&layer, gates)| (layer, gates.iter().map(|&gate| f64::from(gate)).collect()))
        .collect()
}
