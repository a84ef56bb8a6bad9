//! Every file of a model, by relative path.
//!
//! In: a folder, or one `.onnx` file. Out: a sorted list of regular files. Links are resolved and
//! must stay inside; links to folders, devices and pipes are refused by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Error;
use crate::files::Root;
use crate::files::journal::is_pending;
use crate::limits::{FOLDER_DEPTH, FOLDER_FILES};
use crate::onnx::{Limits, ModelFile, Storage, tensors};

/// What lies beside a single model file and belongs to it.
const COMPANIONS: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    crate::files::RECEIPT,
];

/// One regular file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path relative to the folder, with `/`.
    pub relative: String,
    /// The file, all links resolved.
    pub path: PathBuf,
    /// Length in bytes.
    pub len: u64,
}

/// The files of a model.
#[derive(Clone, Debug)]
pub struct Tree {
    folder: PathBuf,
    root: Root,
    whole: bool,
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Every file below `folder`. What an interrupted run of this tool left there is not one.
    ///
    /// # Errors
    /// A link that leads nowhere or out, a link to a folder, a device, a name that is not UTF-8;
    /// [`Error::Pending`] where a patch in place was begun and not finished.
    pub fn of_folder(folder: &Path) -> Result<Tree, Error> {
        Tree::within(folder, FOLDER_FILES)
    }

    fn within(folder: &Path, most: usize) -> Result<Tree, Error> {
        let mut seen = 0;
        let mut tree = Tree::empty(folder)?;
        tree.whole = true;
        let mut waiting = vec![(String::new(), 0)];
        while let Some((base, depth)) = waiting.pop() {
            if depth > FOLDER_DEPTH {
                return Err(tree.too_many(format!("{FOLDER_DEPTH} nested folders")));
            }
            let listed = folder.join(&base);
            let io = crate::files::Error::io("list", &listed);
            for entry in std::fs::read_dir(&listed).map_err(&io)? {
                seen += 1;
                if seen > most {
                    return Err(tree.too_many(format!("{most} files and folders")));
                }
                let entry = entry.map_err(&io)?;
                let name = entry.file_name();
                let Some(name) = name.to_str() else {
                    let relative = format!("{base}{}", name.to_string_lossy());
                    return Err(tree.kind(relative, "a name that is not UTF-8"));
                };
                if name.starts_with('.') && name.contains(".kvw-partial-") {
                    continue;
                }
                let relative = format!("{base}{name}");
                let kind = entry.file_type().map_err(&io)?;
                let followed = match kind.is_symlink() {
                    // One that dangles is reported by `add`.
                    true => std::fs::metadata(entry.path()).map_or(kind, |m| m.file_type()),
                    false => kind,
                };
                if kind.is_dir() {
                    waiting.push((format!("{relative}/"), depth + 1));
                } else if followed.is_dir() {
                    return Err(tree.kind(relative, "a symbolic link to a folder"));
                } else if followed.is_file() || followed.is_symlink() {
                    tree.add(relative)?;
                } else {
                    return Err(tree.kind(relative, crate::files::kind_of(followed)));
                }
            }
        }
        Ok(tree)
    }

    /// One `.onnx` file with its external data and what describes it (configuration, tokenizer).
    ///
    /// # Errors
    /// As [`Tree::of_folder`]; the file is no ONNX model.
    pub fn of_model(path: &Path) -> Result<Tree, Error> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut tree = Tree::empty(folder)?;
        let name = path.file_name().unwrap_or_default();
        let Some(name) = name.to_str() else {
            let relative = name.to_string_lossy().into_owned();
            return Err(tree.kind(relative, "a name that is not UTF-8"));
        };
        let model = ModelFile::open(path, &Limits::default())?;
        tree.add(name.to_owned())?;
        for tensor in tensors(model.proto()) {
            if let Storage::External { location, .. } = model.storage(tensor)? {
                tree.add(beside(name, &location))?;
            }
        }
        for companion in COMPANIONS {
            if folder.join(companion).is_file() {
                tree.add((*companion).to_owned())?;
            }
        }
        Ok(tree)
    }

    /// The folder as given.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder, all links resolved.
    pub fn canonical_folder(&self) -> &Path {
        self.root.folder()
    }

    /// Whether these are all files of the folder, or only those of one model in it.
    pub fn is_whole_folder(&self) -> bool {
        self.whole
    }

    /// All files, by relative path.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// The file `relative`, if it is there.
    pub fn get(&self, relative: &str) -> Option<&Entry> {
        self.entries.get(relative)
    }

    /// The files that end in `.onnx`.
    pub fn onnx(&self) -> impl Iterator<Item = &Entry> {
        self.entries().filter(|e| e.relative.ends_with(".onnx"))
    }

    /// Sum of all lengths in bytes.
    pub fn bytes(&self) -> u64 {
        self.entries().map(|entry| entry.len).sum()
    }

    fn empty(folder: &Path) -> Result<Tree, Error> {
        let root = Root::of(folder).map_err(|source| Error::Entry {
            folder: folder.to_owned(),
            relative: ".".to_owned(),
            source,
        })?;
        // The journal lies in the model folder, the file that is asked for maybe in one below it.
        let mut folders = root.folder().ancestors().take(3);
        if let Some(pending) = folders.find(|folder| is_pending(folder)) {
            return Err(Error::Pending {
                folder: pending.to_owned(),
            });
        }
        Ok(Tree {
            folder: folder.to_owned(),
            root,
            whole: false,
            entries: BTreeMap::new(),
        })
    }

    fn add(&mut self, relative: String) -> Result<(), Error> {
        if self.entries.contains_key(&relative) {
            return Ok(());
        }
        let opened = self.root.open(&relative).map_err(|source| Error::Entry {
            folder: self.folder.clone(),
            relative: relative.clone(),
            source,
        })?;
        let entry = Entry {
            relative: relative.clone(),
            path: opened.path,
            len: opened.len,
        };
        self.entries.insert(relative, entry);
        Ok(())
    }

    fn kind(&self, relative: String, found: &'static str) -> Error {
        Error::Kind {
            folder: self.folder.clone(),
            relative,
            found,
        }
    }

    fn too_many(&self, limit: String) -> Error {
        Error::TooMany {
            folder: self.folder.clone(),
            limit,
        }
    }
}

/// The path, relative to the model folder, of what the ONNX file `relative` calls `location`. The
/// location was checked before: it climbs no higher than the ONNX file's own folder.
pub(crate) fn beside(relative: &str, location: &str) -> String {
    let folder = relative.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut parts: Vec<&str> = Vec::new();
    for part in folder.split('/').chain(location.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::{Tree, beside};

    #[test]
    fn more_files_than_any_model_has_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("onnx")).unwrap();
        for name in ["a", "onnx/b", "onnx/c"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(Tree::within(folder.path(), 4).unwrap().entries().count(), 3);
        let error = Tree::within(folder.path(), 3).unwrap_err().to_string();
        assert!(error.contains("at most 3 files and folders"), "{error}");
    }

    #[test]
    fn a_location_is_relative_to_the_file_that_names_it() {
        assert_eq!(beside("onnx/d.onnx", "d.onnx_data"), "onnx/d.onnx_data");
        assert_eq!(beside("d.onnx", "./x/../d.data"), "d.data");
    }
}
