//! One ONNX Runtime, and sessions on it.
//!
//! In: the library's path, a [`Device`], a thread count. Out: an [`Engine`] that opens sessions over
//! models whose weights stay where they lie ([`SessionModel`]).
//!
//! Promises: the optimization level is `All` (1.19 refuses `Level3`); the choices that move the last
//! bits of a result (version, provider, prepacking, threads) are in [`Engine::describe`].

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use super::Error;
use super::device::Device;
use super::device::Placement;
use super::locate::{self, Located, Version};
use super::memory;
use crate::graph::session::SessionModel;
use crate::graph::widen;

/// How much work a session is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// This many forward passes.
    Forwards(usize),
}

/// From this many forward passes on, rearranging ("prepacking") the weights pays: it costs as much as one
/// forward of 300 tokens or two, and saves 7 % of each (measured on a 0.5 B decoder, one thread of a Zen 4).
const PREPACK_FROM: usize = 32;

/// A started ONNX Runtime.
pub struct Engine {
    environment: Environment,
    library: Located,
    device: Device,
    threads: usize,
    feature_folder: Option<PathBuf>,
    memory: Option<u64>,
    /// How the session opened last runs.
    opened: Mutex<Option<Opened>>,
}

/// What was decided for a session.
#[derive(Clone)]
struct Opened {
    placement: Placement,
    /// Weights are rearranged, in memory of their own.
    prepacked: bool,
    /// float16 weights are converted when they are used, and not kept.
    in_place: bool,
}

impl Engine {
    /// Starts ONNX Runtime from `library` on `device`, with `threads` threads within an operator
    /// (0: as many as there are physical cores).
    ///
    /// # Errors
    /// The library cannot be started, or another one already runs in this process.
    pub fn start(library: Located, device: Device, threads: usize) -> Result<Engine, Error> {
        let environment = locate::load(&library)?;
        environment.set_log_level(ort::logging::LogLevel::Fatal);
        Ok(Engine {
            environment,
            library,
            device,
            threads,
            feature_folder: None,
            memory: memory::total(),
            opened: Mutex::new(None),
        })
    }

    /// The same, keeping image features in `folder` for later runs.
    #[must_use]
    pub fn with_feature_folder(mut self, folder: Option<PathBuf>) -> Engine {
        self.feature_folder = folder;
        self
    }

    /// Where image features are kept for later runs.
    pub fn feature_folder(&self) -> Option<&Path> {
        self.feature_folder.as_deref()
    }

    /// The same on a machine of `bytes` of memory, whatever this one has: a session whose weights do not fit in
    /// several times keeps them where they lie.
    #[must_use]
    pub fn with_memory(mut self, bytes: u64) -> Engine {
        self.memory = Some(bytes);
        self
    }

    /// The library that runs.
    pub fn library(&self) -> &Located {
        &self.library
    }

    /// Where sessions run, once one was opened.
    pub fn placement(&self) -> Option<Placement> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.as_ref().map(|opened| opened.placement.clone())
    }

    /// What a result's last bits depend on, for receipts: version, device, threads, and whether the
    /// session opened last has prepacked weights.
    pub fn describe(&self) -> serde_json::Value {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let device = match &*opened {
            Some(opened) => opened.placement.device.clone(),
            None => self.device.to_string(),
        };
        let mut described = serde_json::json!({
            "onnxruntime": self.library.version.to_string(),
            "device": device,
            "threads": self.threads,
            "graph_optimization_level": "all",
            "prepacked": opened.as_ref().map(|opened| opened.prepacked),
        });
        if opened.as_ref().is_some_and(|opened| opened.in_place) {
            described["float16_weights"] = "converted when used".into();
        }
        described
    }

    /// Opens `graph`, the encoded graph of the file `model`.
    ///
    /// # Errors
    /// The device cannot be had, or ONNX Runtime refuses the model.
    pub fn open(&self, graph: &SessionModel, model: &Path, work: Work) -> Result<Session, Error> {
        let session = |source: ort::Error| Error::Session {
            model: model.to_owned(),
            source,
        };
        let Work::Forwards(forwards) = work;
        let fits = self.fits_twice(graph);
        let prepacked = forwards >= PREPACK_FROM && fits;
        let mut builder = self.builder(prepacked).map_err(session)?;
        let placement;
        (builder, placement) = self.device.apply(builder, &self.library)?;
        let widened = match placement.device == "cpu" && !fits {
            true => widen::float16_weights(&graph.bytes),
            false => None,
        };
        if widened.is_some() {
            builder = builder
                .with_disabled_optimizers(widen::OPTIMIZERS)
                .map_err(ort::Error::from)
                .and_then(|builder| {
                    // What was freed goes back to the system: an arena would keep a copy of each size.
                    let cpu = ort::ep::CPU::default().with_arena_allocator(false);
                    Ok(builder.with_execution_providers([cpu.build()])?)
                })
                .map_err(session)?;
        }
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(Opened {
            placement,
            prepacked,
            in_place: widened.is_some(),
        });
        let bytes = widened.as_ref().unwrap_or(&graph.bytes);
        if self.library.version >= EXTERNAL_DATA_FOLDER {
            let folder = graph.folder.to_string_lossy();
            return builder
                .with_config_entry(
                    "session.model_external_initializers_file_folder_path",
                    folder,
                )
                .map_err(ort::Error::from)
                .and_then(|mut builder| builder.commit_from_memory(bytes))
                .map_err(session);
        }
        // 1.19 and 1.20 look for external data beside the model file only: a scratch folder with the
        // graph and links to the data. (From 1.24 on such links are refused, and not needed.)
        let (_scratch, path) = scratch_folder(graph, bytes).map_err(|source| Error::Scratch {
            model: model.to_owned(),
            source,
        })?;
        builder.commit_from_file(path).map_err(session)
    }

    /// Whether a copy of the weights fits into the machine's memory beside the mapped ones. Asks for the
    /// machine's memory, not for what is free now: the same job must take the same path.
    fn fits_twice(&self, graph: &SessionModel) -> bool {
        let weights: u64 = graph
            .files
            .iter()
            .filter_map(|file| Some(file.metadata().ok()?.len()))
            .sum();
        self.memory
            .is_none_or(|total| weights.saturating_mul(3) < total)
    }

    fn builder(&self, prepack: bool) -> Result<SessionBuilder, ort::Error> {
        let mut builder = Session::builder(&self.environment)?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_prepacking(prepack)?;
        if self.threads > 0 {
            builder = builder.with_intra_threads(self.threads)?;
        }
        Ok(builder)
    }
}

/// The first version that takes the folder of external data as an option.
const EXTERNAL_DATA_FOLDER: Version = Version {
    major: 1,
    minor: 21,
    patch: 0,
};

/// A folder with links to the data files under their names, and the graph under a name that none of
/// them has; the folder and that path.
fn scratch_folder(
    graph: &SessionModel,
    bytes: &[u8],
) -> std::io::Result<(tempfile::TempDir, PathBuf)> {
    let scratch = tempfile::tempdir()?;
    for file in &graph.files {
        let relative = file.strip_prefix(&graph.folder).unwrap_or(file);
        let link = scratch.path().join(relative);
        if let Some(parent) = link.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::os::unix::fs::symlink(file, link)?;
    }
    let mut model = scratch.path().join("session.onnx");
    while model.symlink_metadata().is_ok() {
        model.as_mut_os_string().push("_");
    }
    std::fs::write(&model, bytes)?;
    Ok((scratch, model))
}

#[cfg(test)]
mod tests {
    use super::scratch_folder;
    use crate::graph::session::SessionModel;

    #[test]
    fn the_scratch_graph_takes_the_name_of_no_data_file() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["model.onnx", "session.onnx"];
        let files = names.map(|name| folder.path().join(name));
        for file in &files {
            std::fs::write(file, "weights").unwrap();
        }
        let graph = SessionModel {
            bytes: b"graph".to_vec(),
            folder: folder.path().to_owned(),
            files: files.to_vec(),
        };
        let (scratch, model) = scratch_folder(&graph, &graph.bytes).unwrap();
        assert_eq!(std::fs::read(&model).unwrap(), b"graph");
        assert_eq!(model.parent(), Some(scratch.path()));
        for name in names {
            let linked = std::fs::read(scratch.path().join(name)).unwrap();
            assert_eq!(linked, b"weights", "{name}");
        }
    }
}
