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

/// How much work a session is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// This many forward passes.
    Forwards(usize),
}

/// From this many forward passes on, rearranging ("prepacking") the weights pays: it costs about as
/// much as ten forwards of 300 tokens and saves a tenth of each (measured on a 0.4 B decoder).
const PREPACK_FROM: usize = 100;

/// A started ONNX Runtime.
pub struct Engine {
    environment: Environment,
    library: Located,
    device: Device,
    threads: usize,
    feature_folder: Option<PathBuf>,
    /// Where the session opened last runs, and whether its weights are prepacked.
    opened: Mutex<Option<(Placement, bool)>>,
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

    /// The library that runs.
    pub fn library(&self) -> &Located {
        &self.library
    }

    /// Where sessions run, once one was opened.
    pub fn placement(&self) -> Option<Placement> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.as_ref().map(|(placement, _)| placement.clone())
    }

    /// What a result's last bits depend on, for receipts: version, device, threads, and whether the
    /// session opened last has prepacked weights.
    pub fn describe(&self) -> serde_json::Value {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let (device, prepacked) = match &*opened {
            Some((placement, prepacked)) => (placement.device.clone(), Some(*prepacked)),
            None => (self.device.to_string(), None),
        };
        serde_json::json!({
            "onnxruntime": self.library.version.to_string(),
            "device": device,
            "threads": self.threads,
            "graph_optimization_level": "all",
            "prepacked": prepacked,
        })
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
        let prepack = forwards >= PREPACK_FROM && fits_twice(graph);
        let mut builder = self.builder(prepack).map_err(session)?;
        let placement;
        (builder, placement) = self.device.apply(builder, &self.library)?;
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some((placement, prepack));
        if self.library.version >= EXTERNAL_DATA_FOLDER {
            let folder = graph.folder.to_string_lossy();
            return builder
                .with_config_entry(
                    "session.model_external_initializers_file_folder_path",
                    folder,
                )
                .map_err(ort::Error::from)
                .and_then(|mut builder| builder.commit_from_memory(&graph.bytes))
                .map_err(session);
        }
        // 1.19 and 1.20 look for external data beside the model file only: a scratch folder with the
        // graph and links to the data. (From 1.24 on such links are refused, and not needed.)
        let (_scratch, path) = scratch_folder(graph).map_err(|source| Error::Scratch {
            model: model.to_owned(),
            source,
        })?;
        builder.commit_from_file(path).map_err(session)
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

/// Whether the prepacked copy of the weights fits into this machine's memory beside the mapped ones.
/// Asks for the machine's memory, not for what is free now: the same job must take the same path.
fn fits_twice(graph: &SessionModel) -> bool {
    let weights: u64 = graph
        .files
        .iter()
        .filter_map(|file| Some(file.metadata().ok()?.len()))
        .sum();
    memory::total().is_none_or(|total| weights.saturating_mul(3) < total)
}

/// The first version that takes the folder of external data as an option.
const EXTERNAL_DATA_FOLDER: Version = Version {
    major: 1,
    minor: 21,
    patch: 0,
};

/// A folder with links to the data files under their names, and the graph under a name that none of
/// them has; the folder and that path.
fn scratch_folder(graph: &SessionModel) -> std::io::Result<(tempfile::TempDir, PathBuf)> {
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
    std::fs::write(&model, &graph.bytes)?;
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
        let (scratch, model) = scratch_folder(&graph).unwrap();
        assert_eq!(std::fs::read(&model).unwrap(), b"graph");
        assert_eq!(model.parent(), Some(scratch.path()));
        for name in names {
            let linked = std::fs::read(scratch.path().join(name)).unwrap();
            assert_eq!(linked, b"weights", "{name}");
        }
    }
}
