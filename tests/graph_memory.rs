//! What an ONNX graph takes in memory, counted by the allocator of this process.
//!
//! One test, because what other tests allocate would be counted too.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvw::graph::Index;
use kvw::graph::mlp::survey;
use kvw::limits::allowed_graph;
use kvw::onnx::schema::{GraphProto, ModelProto};
use kvw::onnx::{Limits, ModelFile, Text, graphs};
use prost::Message as _;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all the work; what is added touches two numbers.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Large blocks are moved page by page, so both are never held.
        let before = NOW.fetch_add(size, Ordering::Relaxed);
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        PEAK.fetch_max(before + size - layout.size(), Ordering::Relaxed);
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `act` returns, and the bytes that it held at most.
fn peak<T>(act: impl FnOnce() -> T) -> (T, u64) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = act();
    (result, (PEAK.load(Ordering::Relaxed) - before) as u64)
}

fn open(path: &Path, decoded_bytes: u64) -> Option<ModelFile> {
    let limits = Limits {
        decoded_bytes,
        ..Limits::default()
    };
    ModelFile::open(path, &limits).ok()
}

/// The least budget under which `path` is opened, to a 512th of `allowed`.
fn counted(path: &Path, allowed: u64) -> u64 {
    let (mut least, mut most) = (0, allowed);
    assert!(open(path, most).is_some(), "{}", path.display());
    while most - least > allowed / 512 {
        let middle = least + (most - least) / 2;
        match open(path, middle) {
            Some(_) => most = middle,
            None => least = middle,
        }
    }
    most
}

/// Bytes of `model` that are not weights.
fn structure(model: &ModelFile) -> u64 {
    let weights = graphs(model.proto());
    let weights = weights.iter().flat_map(|graph| &graph.initializer);
    let weights = weights.filter_map(|tensor| tensor.raw_data.as_ref());
    model.size() - weights.map(|raw| raw.len() as u64).sum::<u64>()
}

/// The graph `times` times in one file, each with names of its own: as large as that of a model of many layers.
fn many_times(model: &ModelFile, times: usize) -> ModelProto {
    let mut whole = model.proto().clone();
    let graph = whole.graph.as_mut().unwrap();
    let one = GraphProto {
        input: Default::default(),
        output: Default::default(),
        ..graph.clone()
    };
    for copy in 1..times {
        let mut one = one.clone();
        let new = |name: &mut Text| *name = format!("{copy}{name}").into();
        for node in &mut one.node {
            let values = node.input.iter_mut().chain(&mut node.output);
            values.chain(&mut node.name).for_each(new);
        }
        let tensors = one.initializer.iter_mut();
        tensors
            .filter_map(|tensor| tensor.name.as_mut())
            .for_each(new);
        let infos = one.value_info.iter_mut();
        infos.filter_map(|info| info.name.as_mut()).for_each(new);
        graph.node.append(&mut one.node);
        graph.initializer.append(&mut one.initializer);
        graph.value_info.append(&mut one.value_info);
    }
    for tensor in &mut graph.initializer {
        if tensor.raw_data.as_ref().is_some_and(|raw| raw.len() > 64) {
            tensor.dims = [0].into();
            tensor.raw_data = Some(Default::default());
        }
    }
    whole
}

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut folders = vec![root];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => folders.push(path),
                Some(end) if end == "onnx" => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_graph_takes_what_is_counted_and_at_most_four_times_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut paths = fixtures();
    assert!(paths.len() > 50);
    // As large as those of models of a hundred layers: the allowance is small beside them.
    for (name, times) in [
        ("dynamo-gpt2/model.onnx", 20),
        ("optimum124-opt-legacy/decoder_model_merged.onnx", 20),
        ("tjs-qwen2_vl/onnx/decoder_model_merged_fp16.onnx", 40),
    ] {
        let exports = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
        let model = open(&exports.join(name), 1 << 30).unwrap();
        let path = folder.path().join(name.replace('/', "-"));
        std::fs::write(&path, many_times(&model, times).encode_to_vec()).unwrap();
        paths.push(path);
    }
    for path in paths {
        let (model, opened) = peak(|| open(&path, 1 << 30).unwrap());
        let inlined = model.has_inlined_functions();
        let structure = structure(&model);
        let counted = counted(&path, allowed_graph(structure));
        let ((), surveyed) = peak(|| drop(survey(&Index::new(model.graph()), None)));
        let factor = |bytes: u64| bytes as f64 / structure as f64;
        if structure > 3 << 20 {
            println!(
                "{}: {:.1} MB; counted {:.2}, opening {:.2}, survey {:.2} times that",
                path.file_name().unwrap().display(),
                structure as f64 / 1e6,
                factor(counted),
                factor(opened),
                factor(surveyed),
            );
            assert!(factor(opened) < 2.5 && factor(surveyed) < 1.5);
        }
        // A path and a map are opened too.
        assert!(
            inlined || opened <= counted + (16 << 10),
            "{}: {opened} {counted}",
            path.display()
        );
    }
}
