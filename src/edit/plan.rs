//! What an edit will change, before it changes anything.
//!
//! In: a [`Bundle`], gates per layer, the identity of the model that they are for, and the form that is
//! wanted. Out: an [`EditPlan`]: byte ranges to multiply, and for files whose graph must change the bytes
//! to cut and put in. It covers every decoder file of the folder (and every vision encoder, if the gates are about that), or there is none; it was checked that
//! the files hold the plan's model, and that nothing else in the folder uses the bytes.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::form::{Chosen, Cost, EditForm, FormChoice, Subject, choose};
use super::identity::{self, LayerIdentity, ModelIdentity};
use super::inspect::{check_layers, check_vision, mlps};
use super::receipt::Receipt;
use super::recipe::{Changes, Failure, Place, Rewriter};
use super::rewrite::{Change, Fault, Surgeon};
use super::scale::Scaling;
use super::{Error, Mismatch};
use crate::bundle::{Bundle, OnnxFile, Role, beside, check_one_model};
use crate::files::{Sha256, Sha256Hasher};
use crate::graph::{Index, LayerId, Mlp, Tower};
use crate::onnx::schema::TensorProto;
use crate::onnx::splice::Splice;
use crate::onnx::{ByteSpan, DataType, Limits, ModelFile, Storage, tensors};

/// One stored matrix, to be multiplied by gates along one axis.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorEdit {
    /// The file that holds the bytes, relative to the model folder.
    pub file: String,
    /// The tensor's name.
    pub tensor: String,
    /// Decoder layer.
    pub layer: LayerId,
    /// The form of the edit.
    pub form: EditForm,
    /// The bytes in that file.
    pub span: ByteSpan,
    /// Element type.
    pub dtype: DataType,
    /// Stored rows.
    pub rows: usize,
    /// Stored columns.
    pub columns: usize,
    /// The stored axis that the gates run along, 0 or 1.
    pub axis: usize,
    /// One gate for each slice along the axis.
    #[serde(skip)]
    pub(super) gates: Arc<[f32]>,
    /// What the bytes must be, where the plan was made for this very precision.
    #[serde(skip)]
    pub(super) expected: Option<Sha256>,
}

impl TensorEdit {
    /// The gates along the axis.
    pub fn gates(&self) -> &[f32] {
        &self.gates
    }

    pub(super) fn scaling(&self) -> Scaling<'_> {
        Scaling {
            dtype: self.dtype,
            columns: self.columns,
            axis: self.axis,
            gates: &self.gates,
        }
    }
}

/// How one MLP of one file is weakened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpEdit {
    /// The decoder file, relative to the model folder.
    pub file: String,
    /// Decoder layer.
    pub layer: LayerId,
    /// The down projection's node; may be empty.
    pub node: String,
    /// The form of the edit.
    pub form: EditForm,
    /// Whether the file's graph changes.
    pub graph: bool,
    /// What it costs at inference.
    pub cost: Cost,
}

/// One `.onnx` file whose graph changes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GraphEdit {
    /// The file, relative to the model folder.
    pub file: String,
    /// Its length before, in bytes.
    pub bytes_before: u64,
    /// Its length after, in bytes.
    pub bytes_after: u64,
    /// What changes, in words.
    pub changes: Vec<String>,
    #[serde(skip)]
    pub(super) list: Vec<Change>,
    #[serde(skip)]
    pub(super) splice: Splice,
}

/// Everything that an edit will change, by file and offset.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EditPlan {
    /// Digest of the gates: the same for every folder that they are applied to.
    digest: Sha256,
    mlps: Vec<MlpEdit>,
    edits: Vec<TensorEdit>,
    graphs: Vec<GraphEdit>,
}

impl EditPlan {
    /// As [`EditPlan::in_form`], each MLP in the first form that fits.
    ///
    /// # Errors
    /// Those of [`EditPlan::in_form`].
    pub fn new(
        bundle: &Bundle,
        gates: &BTreeMap<LayerId, Vec<f32>>,
        identity: &ModelIdentity,
    ) -> Result<EditPlan, Error> {
        EditPlan::in_form(bundle, gates, identity, FormChoice::Auto)
    }

    /// Plans the edit of every decoder file of `bundle` by `gates` (`[d_ff]` by layer), computed on the
    /// model `identity`, in the form that `choice` asks for.
    ///
    /// Layers and shapes must be those of `identity`, and the weights must match by sketch. Where a
    /// file has the precision of `identity`, its exact bytes are checked too: by [`apply`](super::apply())
    /// while it copies them, or now by [`EditPlan::check_bytes`].
    ///
    /// # Errors
    /// A gate that is not finite or too many or few of them; [`Error::NothingToChange`] when all are
    /// 1; another model; a layer of some decoder file that cannot be edited; bytes that something
    /// else uses too.
    pub fn in_form(
        bundle: &Bundle,
        gates: &BTreeMap<LayerId, Vec<f32>>,
        identity: &ModelIdentity,
        choice: FormChoice,
    ) -> Result<EditPlan, Error> {
        let gates = effective(bundle, gates)?;
        let digest = gates_digest(&gates);
        // Applied once more the weights would no longer match, but that would not say why.
        if Receipt::of(bundle.tree())?.is_some_and(|receipt| receipt.names(digest)) {
            return Err(Error::AlreadyApplied {
                folder: bundle.folder().to_owned(),
                digest: digest.to_string(),
            });
        }
        let models = bundle
            .files()
            .iter()
            .map(|file| Ok((file, ModelFile::open(&file.path, &Limits::default())?)))
            .collect::<Result<Vec<_>, Error>>()?;
        if bundle.decoders().next().is_none() {
            return Err(Error::NoDecoder {
                folder: bundle.folder().to_owned(),
            });
        }
        let opened: Vec<_> = models.iter().map(|(file, model)| (*file, model)).collect();
        check_one_model(bundle, &opened)?;
        let mut edits: BTreeMap<(String, ByteSpan), TensorEdit> = BTreeMap::new();
        let mut planned = HashSet::new();
        let (mut weakened, mut graphs) = (Vec::new(), Vec::new());
        for (file, model) in &models {
            let index = Index::new(model.graph());
            let mlps = mlps(bundle, file, &index);
            let surgeon = Surgeon::new(model, &index);
            let context = File {
                bundle,
                file,
                model,
                index: &index,
                surgeon: surgeon.as_ref(),
                identity,
                choice,
            };
            match file.role {
                Role::Decoder | Role::VisionEncoder => {
                    let changed = context.edits(&mlps, &gates)?;
                    weakened.extend(changed.mlps);
                    for (tensor, edit) in changed.edits {
                        planned.insert(std::ptr::from_ref(tensor));
                        merge(&mut edits, edit)?;
                    }
                    graphs.extend(changed.graph);
                }
                Role::Other => context.refuse_copies(&mlps, &gates)?,
                Role::EmbedTokens | Role::LmHead => {}
            }
        }
        let edits: Vec<TensorEdit> = edits.into_values().collect();
        for (file, model) in &models {
            refuse_overlaps(file, model, &edits, &planned)?;
        }
        Ok(EditPlan {
            digest,
            mlps: weakened,
            edits,
            graphs,
        })
    }

    /// Digest of the gates that differ from 1, by layer: what a receipt calls the plan.
    pub fn digest(&self) -> Sha256 {
        self.digest
    }

    /// How each MLP of each decoder file is weakened.
    pub fn mlps(&self) -> &[MlpEdit] {
        &self.mlps
    }

    /// Whether a gate of exactly 0 removes its knowledge vector from every decoder file: only where columns of a float
    /// `W_down` are multiplied where they lie. Any other form leaves the vector in the file, unused.
    ///
    /// # Errors
    /// [`Error::NotRemoved`] with the first file and layer of `gates` that keeps one.
    pub fn check_removal(&self, gates: &BTreeMap<LayerId, Vec<f32>>) -> Result<(), Error> {
        let removes = |layer| {
            let gates = gates.get(&layer).into_iter().flatten();
            gates.into_iter().any(|&gate| gate == 0.0)
        };
        let keeps = |mlp: &&MlpEdit| mlp.form != EditForm::Columns || mlp.graph;
        match (self.mlps.iter().filter(keeps)).find(|mlp| removes(mlp.layer)) {
            Some(mlp) => Err(Error::NotRemoved {
                file: mlp.file.clone(),
                layer: mlp.layer,
                form: mlp.form,
            }),
            None => Ok(()),
        }
    }

    /// The files whose graphs change.
    pub fn graphs(&self) -> &[GraphEdit] {
        &self.graphs
    }

    /// By how many bytes the files grow.
    pub fn growth(&self) -> u64 {
        let grown = |graph: &GraphEdit| graph.bytes_after.saturating_sub(graph.bytes_before);
        self.graphs.iter().map(grown).sum()
    }

    /// The byte ranges that are multiplied, by file and offset.
    pub fn edits(&self) -> &[TensorEdit] {
        &self.edits
    }

    /// Bytes in all planned ranges.
    pub fn bytes(&self) -> u64 {
        self.edits.iter().map(|edit| edit.span.len).sum()
    }

    /// Checks now what [`apply`](super::apply()) checks while copying: that every file in the precision
    /// of the plan's model holds its exact bytes. For a dry run.
    ///
    /// # Errors
    /// [`Error::OtherModel`], or a file that cannot be read.
    pub fn check_bytes(&self, bundle: &Bundle) -> Result<(), Error> {
        self.edits.par_iter().try_for_each(|edit| {
            let source = super::read::Source::open(&bundle.folder().join(&edit.file))?;
            let mut hasher = Sha256Hasher::default();
            let mut bytes = Vec::new();
            for block in super::read::blocks(edit.span) {
                bytes.resize(super::read::short(block.len), 0);
                source.read_at(block.offset, &mut bytes)?;
                hasher.update(&bytes);
            }
            edit.check(hasher.finish())
        })
    }
}

impl TensorEdit {
    /// Compares the digest of the bytes before the edit with what the plan expects, if it does.
    pub(super) fn check(&self, found: Sha256) -> Result<(), Error> {
        match self.expected {
            Some(expected) if expected != found => Err(Error::OtherModel {
                file: self.file.clone(),
                mismatch: Mismatch::Bytes {
                    layer: self.layer,
                    expected,
                    found,
                },
            }),
            _ => Ok(()),
        }
    }
}

/// The layers with a gate other than 1, every gate finite.
#[allow(clippy::float_cmp)] // Exactly 1 is what changes nothing.
fn effective(
    bundle: &Bundle,
    gates: &BTreeMap<LayerId, Vec<f32>>,
) -> Result<BTreeMap<LayerId, Arc<[f32]>>, Error> {
    let mut effective = BTreeMap::new();
    for (&layer, gates) in gates {
        if let Some((neuron, &found)) = gates.iter().enumerate().find(|(_, g)| !g.is_finite()) {
            return Err(Error::Gate {
                layer,
                neuron,
                found,
            });
        }
        if gates.iter().any(|&gate| gate != 1.0) {
            effective.insert(layer, Arc::from(gates.as_slice()));
        }
    }
    match effective.is_empty() {
        true => Err(Error::NothingToChange {
            folder: bundle.folder().to_owned(),
        }),
        false => Ok(effective),
    }
}

/// Digest of the gates (`[d_ff]` by layer) that are not all 1: what a receipt calls the plan.
pub fn gates_digest<G: AsRef<[f32]>>(gates: &BTreeMap<LayerId, G>) -> Sha256 {
    let mut hasher = Sha256Hasher::default();
    hasher.update(b"kvw gates 1\n");
    for (&layer, gates) in gates {
        let gates = gates.as_ref();
        if gates.iter().all(|&gate| gate == 1.0) {
            continue;
        }
        // The highest bit tells a vision layer: no number of a layer reaches it.
        let tower = match layer.tower() {
            Tower::Vision => 1 << 63,
            _ => 0,
        };
        hasher.update(&(layer.number() as u64 | tower).to_le_bytes());
        hasher.update(&(gates.len() as u64).to_le_bytes());
        for gate in gates {
            hasher.update(&gate.to_le_bytes());
        }
    }
    hasher.finish()
}

/// One ONNX file, opened, beside the model that it should hold.
struct File<'a, 'm> {
    bundle: &'a Bundle,
    file: &'a OnnxFile,
    model: &'m ModelFile,
    index: &'a Index<'m>,
    surgeon: Result<&'a Surgeon<'a, 'm>, &'a Fault>,
    identity: &'a ModelIdentity,
    choice: FormChoice,
}

/// What changes in one file.
struct Changed<'m> {
    mlps: Vec<MlpEdit>,
    edits: Vec<(&'m TensorProto, TensorEdit)>,
    graph: Option<GraphEdit>,
}

impl<'m> File<'_, 'm> {
    fn other_model(&self, mismatch: Mismatch) -> Error {
        Error::OtherModel {
            file: self.file.relative.clone(),
            mismatch,
        }
    }

    fn not_editable(&self, layer: LayerId, mlp: &Mlp<'_>, reason: String) -> Error {
        Error::NotEditable {
            file: self.file.relative.clone(),
            layer,
            node: mlp.sites.first().map_or("", |site| site.node).to_owned(),
            tensor: mlp.down().weight.tensor.name().to_owned(),
            reason,
        }
    }

    fn subject<'s>(&'s self, mlp: &'s Mlp<'m>) -> Subject<'s, 'm> {
        Subject {
            model: self.model,
            index: self.index,
            surgeon: self.surgeon,
            mlp,
        }
    }

    /// Whether the layers of `tower` are to be found in this file.
    fn is_of(&self, tower: Tower) -> bool {
        let role = match tower {
            Tower::Vision if self.bundle.has(Role::VisionEncoder) => Role::VisionEncoder,
            Tower::Projector => return false,
            _ => Role::Decoder,
        };
        self.file.role == role
    }

    /// The same, and the plan is about them.
    fn holds(&self, tower: Tower) -> bool {
        self.is_of(tower) && self.identity.of_tower(tower).next().is_some()
    }

    /// The edits of a decoder file, or of a vision encoder's.
    fn edits(
        &self,
        mlps: &[Mlp<'m>],
        gates: &BTreeMap<LayerId, Arc<[f32]>>,
    ) -> Result<Changed<'m>, Error> {
        if self.holds(Tower::Language) {
            check_layers(self.bundle, self.file, self.index, mlps)?;
        }
        if self.holds(Tower::Vision) {
            check_vision(self.file, self.index, mlps)?;
        }
        let numbered: BTreeMap<LayerId, Vec<&Mlp<'m>>> = mlps
            .iter()
            .filter(|mlp| self.holds(mlp.tower))
            .filter_map(|mlp| Some((mlp.id()?, mlp)))
            .fold(BTreeMap::new(), |mut layers, (layer, mlp)| {
                layers.entry(layer).or_insert_with(Vec::new).push(mlp);
                layers
            });
        let identity: Vec<&LayerIdentity> = (self.identity.layers.iter())
            .filter(|layer| self.holds(layer.layer.tower()))
            .collect();
        let expected: Vec<LayerId> = identity.iter().map(|l| l.layer).collect();
        let found: Vec<LayerId> = numbered.keys().copied().collect();
        if expected != found {
            return Err(self.other_model(Mismatch::Layers { expected, found }));
        }
        let missing = |layer: &&LayerId| self.is_of(layer.tower()) && !numbered.contains_key(layer);
        if let Some(layer) = gates.keys().find(missing) {
            return Err(Error::Layers {
                file: self.file.relative.clone(),
                expected: format!("layer {layer}, for which the plan has gates"),
                found: format!("layers {}", identity::listed(&found)),
            });
        }
        let mut weakened = Vec::new();
        for (layer, mlps) in identity.into_iter().zip(numbered.values()) {
            for mlp in mlps {
                identity::check_shape(layer, mlp.d_ff, mlp.d_model)
                    .map_err(|mismatch| self.other_model(mismatch))?;
                if let Some(gates) = gates.get(&layer.layer) {
                    weakened.push((layer, *mlp, gates));
                }
            }
        }
        let chosen = weakened
            .par_iter()
            .map(|(layer, mlp, gates)| self.chosen(layer, mlp, gates))
            .collect::<Result<Vec<_>, Error>>()?;
        let mut changed = Changed {
            mlps: Vec::new(),
            edits: Vec::new(),
            graph: None,
        };
        let mut changes = Changes::default();
        for ((layer, mlp, gates), (chosen, expected)) in weakened.iter().zip(chosen) {
            changed.mlps.push(MlpEdit {
                file: self.file.relative.clone(),
                layer: layer.layer,
                node: mlp.sites.first().map_or("", |site| site.node).to_owned(),
                form: chosen.recipe.form,
                graph: chosen.recipe.changes_graph(),
                cost: chosen.recipe.cost,
            });
            let edits = self.ranges(layer.layer, &chosen, gates, expected);
            changed.edits.extend(edits);
            let subject = self.subject(mlp);
            let rewriter = Rewriter {
                subject: &subject,
                layer: layer.layer,
                gates,
            };
            for rewrite in &chosen.recipe.rewrites {
                rewriter
                    .add(rewrite, &mut changes)
                    .map_err(|failure| match failure {
                        Failure::Fault(fault) => {
                            self.not_editable(layer.layer, mlp, fault.to_string())
                        }
                        Failure::Error(error) => error,
                    })?;
            }
        }
        changed.graph = self.graph_edit(changes.list)?;
        Ok(changed)
    }

    /// The form for one MLP, and what its `W_down` must be to the byte, where the plan knows.
    fn chosen(
        &self,
        layer: &LayerIdentity,
        mlp: &Mlp<'m>,
        gates: &Arc<[f32]>,
    ) -> Result<(Chosen<'m>, Option<Sha256>), Error> {
        if gates.len() as u64 != mlp.d_ff {
            return Err(Error::GateCount {
                file: self.file.relative.clone(),
                layer: layer.layer,
                expected: mlp.d_ff,
                found: gates.len(),
            });
        }
        // Bytes that cannot be reached are the file's fault, with its own hint, and no form's.
        self.model.storage(mlp.down().weight.tensor)?;
        let chosen = choose(&self.subject(mlp), self.choice)
            .map_err(|reason| self.not_editable(layer.layer, mlp, reason))?;
        let expected = identity::check_layer(self.model, mlp, layer)?
            .map_err(|mismatch| self.other_model(mismatch))?;
        Ok((chosen, expected))
    }

    /// The byte ranges that a recipe multiplies.
    fn ranges(
        &self,
        layer: LayerId,
        chosen: &Chosen<'m>,
        gates: &Arc<[f32]>,
        expected: Option<Sha256>,
    ) -> Vec<(&'m TensorProto, TensorEdit)> {
        let recipe = &chosen.recipe;
        let in_place = recipe.in_place.iter();
        in_place
            .map(|there| {
                let array = &there.array;
                let (file, span) = match &there.place {
                    Place::Onnx(span) => (self.file.relative.clone(), *span),
                    Place::External { location, span } => {
                        (beside(&self.file.relative, location), *span)
                    }
                };
                let edit = TensorEdit {
                    file,
                    tensor: array.stored.name.to_owned(),
                    layer,
                    form: recipe.form,
                    span,
                    dtype: array.dtype,
                    rows: array.rows,
                    columns: array.columns,
                    axis: array.axis,
                    gates: array.gates(gates),
                    expected: expected.filter(|_| recipe.form == EditForm::Columns),
                };
                (array.stored.tensor, edit)
            })
            .collect()
    }

    fn graph_edit(&self, list: Vec<Change>) -> Result<Option<GraphEdit>, Error> {
        if list.is_empty() {
            return Ok(None);
        }
        let not_changeable = |fault: &Fault| Error::Graph {
            file: self.file.relative.clone(),
            reason: fault.to_string(),
        };
        let surgeon = self.surgeon.map_err(not_changeable)?;
        let splice = surgeon
            .splice(&list)
            .map_err(|fault| not_changeable(&fault))?;
        Ok(Some(GraphEdit {
            file: self.file.relative.clone(),
            bytes_before: splice.len_before(),
            bytes_after: splice.len_after(),
            changes: list.iter().map(|change| surgeon.describe(change)).collect(),
            list,
            splice,
        }))
    }

    /// A file that is no decoder by its name must not hold the weights that are to be weakened: they
    /// would be in the output as they were.
    fn refuse_copies(
        &self,
        mlps: &[Mlp<'m>],
        gates: &BTreeMap<LayerId, Arc<[f32]>>,
    ) -> Result<(), Error> {
        for mlp in mlps {
            let weakened = (self.identity.layers.iter())
                .find(|l| Some(l.layer) == mlp.id() && gates.contains_key(&l.layer));
            let Some(layer) = weakened else { continue };
            if identity::check_shape(layer, mlp.d_ff, mlp.d_model).is_err() {
                continue;
            }
            if identity::check_layer(self.model, mlp, layer)?.is_ok() {
                return Err(Error::Uncovered {
                    file: self.file.relative.clone(),
                    layer: layer.layer,
                    tensor: mlp.down().weight.tensor.name().to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// The file, relative to the model folder, and the bytes in it, of a tensor of the ONNX file `onnx`.
pub(super) fn place(onnx: &str, storage: &Storage) -> Option<(String, ByteSpan)> {
    match storage {
        Storage::Inline(span) => Some((onnx.to_owned(), *span)),
        Storage::External { location, span, .. } => Some((beside(onnx, location), *span)),
        Storage::Typed => None,
    }
}

/// Adds an edit. Two decoder files may share their weights: the same edit of the same bytes is one.
fn merge(
    edits: &mut BTreeMap<(String, ByteSpan), TensorEdit>,
    edit: TensorEdit,
) -> Result<(), Error> {
    use std::collections::btree_map::Entry;
    match edits.entry((edit.file.clone(), edit.span)) {
        Entry::Vacant(place) => {
            place.insert(edit);
            Ok(())
        }
        Entry::Occupied(place) => {
            let there = place.get();
            let same = (there.layer, there.axis, there.dtype, there.rows)
                == (edit.layer, edit.axis, edit.dtype, edit.rows);
            match same {
                true => Ok(()),
                false => Err(overlap(
                    &edit,
                    format!("'{}' of layer {}", there.tensor, there.layer),
                )),
            }
        }
    }
}

fn overlap(edit: &TensorEdit, other: String) -> Error {
    Error::Overlap {
        data: edit.file.clone(),
        span: edit.span,
        tensor: edit.tensor.clone(),
        other,
    }
}

/// Refuses planned bytes that another tensor of `model`, or another planned range, shares.
fn refuse_overlaps(
    file: &OnnxFile,
    model: &ModelFile,
    edits: &[TensorEdit],
    planned: &HashSet<*const TensorProto>,
) -> Result<(), Error> {
    let touched: BTreeSet<&str> = edits.iter().map(|edit| edit.file.as_str()).collect();
    for tensor in tensors(model.proto()) {
        let Some((data, span)) = place(&file.relative, &model.storage(tensor)?) else {
            continue;
        };
        if !touched.contains(data.as_str()) {
            continue;
        }
        // Sorted by file and offset: the first edit that ends behind the span's start, if any.
        let from = edits.partition_point(|edit| {
            (
                edit.file.as_str(),
                edit.span.offset.saturating_add(edit.span.len),
            ) <= (data.as_str(), span.offset)
        });
        let near = edits.iter().skip(from).take(2);
        for edit in near.filter(|edit| edit.file == data && edit.span.overlaps(span)) {
            let itself = planned.contains(&std::ptr::from_ref(tensor)) && edit.span == span;
            if !itself {
                let name = tensor.name();
                return Err(overlap(
                    edit,
                    format!("'{name}' of {} ({span})", file.relative),
                ));
            }
        }
    }
    Ok(())
}
