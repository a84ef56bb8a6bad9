//! Every limit holds, is documented, and is met before what lies beyond it is paid for; and no reader waits
//! for a pipe or runs full of a device.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use kvw::bundle::{Bundle, Error as BundleError, Tree};
use kvw::check::Policy;
use kvw::confine::{self, Budget, Fault};
use kvw::dataset::{self, Error as DatasetError, ImageSource, ReadOptions};
use kvw::eval::Evidence;
use kvw::limits;
use kvw::onnx::{Limits, ModelFile};
use kvw::preprocess::{Feed, ModelDir, Tokenizer, image, template::ChatTemplate};
use kvw::provenance::key::{PrivateKey, PublicKey};
use kvw::sweep::Sweep;
use parquet::basic::{Repetition, Type as PhysicalType};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use parquet::file::metadata::{
    ParquetMetaData, ParquetMetaDataReader, ParquetMetaDataWriter, RowGroupMetaData,
};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;

// ---------------------------------------------------------------- documentation

const BEGIN: &str = "<!-- limits: from src/limits.rs -->\n";
const END: &str = "<!-- end of limits -->\n";

/// With `KVW_WRITE_DOCS=1` the table is written instead.
#[test]
fn the_documentation_has_the_limits_of_the_code() {
    let mut table = String::from("| of | at most | why |\n|---|---|---|\n");
    for limit in limits::ALL {
        let why = limit
            .why
            .trim()
            .replace("[`FOLDER_FILES`]", "the files of a folder");
        table += &format!("| {} | {limit} | {why} |\n", limit.of);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/security.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    if std::env::var_os("KVW_WRITE_DOCS").is_some() {
        fs::write(&path, [before, BEGIN, &table, END, after].concat()).unwrap();
        return;
    }
    assert_eq!(found, table, "run the test once with KVW_WRITE_DOCS=1");
}

#[test]
fn every_limit_has_its_hostile_test() {
    let mut sources = String::new();
    let mut waiting = vec![
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src"),
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests"),
    ];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources += &fs::read_to_string(path).unwrap();
            }
        }
    }
    for limit in limits::ALL {
        let test = format!("fn {}()", limit.test);
        assert_eq!(sources.matches(&test).count(), 1, "{}: {test}", limit.name);
    }
}

// ---------------------------------------------------------------- whole files

/// A reader of whole files, by what it is called.
type Read = (&'static str, u64, fn(&Path) -> Result<(), String>);

fn message<T, E: std::error::Error>(result: Result<T, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text += &format!(": {cause}");
            source = cause.source();
        }
        text
    })
}

/// What `config.json` and `chat_template.jinja` are read by takes a folder.
fn in_folder<T>(path: &Path, name: &str, read: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), r#"{"model_type": "x"}"#).unwrap();
    let file = folder.path().join(name);
    let _ = fs::remove_file(&file);
    std::os::unix::fs::symlink(path, file).unwrap();
    read(folder.path())
}

const READERS: &[Read] = &[
    ("tokenizer", limits::TOKENIZER_BYTES, |path| {
        message(Tokenizer::open(path))
    }),
    ("configuration", limits::JSON_BYTES, |path| {
        in_folder(path, "config.json", |folder| {
            message(ModelDir::open(folder))
        })
    }),
    ("template", limits::TEMPLATE_BYTES, |path| {
        in_folder(path, "chat_template.jinja", |folder| {
            message(ChatTemplate::open(&ModelDir::open(folder).unwrap()))
        })
    }),
    ("JSONL", limits::JSONL_BYTES, |path| {
        message(dataset::read_jsonl(path))
    }),
    ("picture", limits::IMAGE_BYTES, |path| {
        message(image::read(&ImageSource::File(path.to_owned())))
    }),
    ("feed", limits::FEED_BYTES, |path| message(Feed::read(path))),
    ("evaluation", limits::EVALUATION_BYTES, |path| {
        message(Evidence::read(path))
    }),
    ("sweep", limits::SWEEP_BYTES, |path| {
        message(Sweep::read(path))
    }),
    ("policy", limits::POLICY_BYTES, |path| {
        message(Policy::read(path))
    }),
    ("receipt", limits::JSON_BYTES, |path| {
        message(kvw::edit::Receipt::read(path))
    }),
    ("private key", limits::KEY_BYTES, |path| {
        message(PrivateKey::read(path))
    }),
    ("public key", limits::KEY_BYTES, |path| {
        message(PublicKey::read(path))
    }),
];

/// Readers that map or stream a file: there is no limit on its length.
const OTHERS: &[Read] = &[
    ("model", 0, |path| {
        message(ModelFile::open(path, &Limits::default()))
    }),
    ("plan", 0, |path| message(kvw::kvw::load_plan(path))),
    ("coefficients", 0, |path| {
        message(kvw::kvw::load_coefficients(path))
    }),
    ("part", 0, |path| message(kvw::kvw::load_part(path))),
    ("digest", 0, |path| {
        message(kvw::files::Sha256::of_file(path))
    }),
    ("parquet", 0, |path| {
        let address = format!("clear:{}", path.display());
        message(dataset::read(Path::new(&address), &ReadOptions::default()))
    }),
    ("feeds", 0, |path| message(dataset::read_feeds(path))),
    ("folder", 0, |path| message(Bundle::open(path))),
];

#[test]
fn files_past_their_limit_are_refused_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.bin");
    for (name, limit, read) in READERS {
        // A hole: it takes no room, and would take its length in memory.
        File::create(&path).unwrap().set_len(limit + 1).unwrap();
        let error = read(&path).unwrap_err();
        let expected = format!("expected at most {limit} bytes, found {}", limit + 1);
        assert!(error.contains(&expected), "{name}: {error}");
        let named = error.contains(&folder.path().display().to_string())
            || error.contains("config.json")
            || error.contains("chat_template.jinja");
        assert!(named, "{name}: {error}");
    }
    // The sums of a folder are read where they lie.
    let sums = folder.path().join("SHA256SUMS");
    fs::remove_file(&path).unwrap();
    File::create(&sums)
        .unwrap()
        .set_len(limits::SUMS_BYTES + 1)
        .unwrap();
    let error = message(kvw::provenance::verify(folder.path(), None)).unwrap_err();
    assert!(error.contains("SHA256SUMS: expected at most"), "{error}");
}

#[test]
fn a_text_longer_than_any_prompt_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.jsonl");
    for (repeats, refused) in [
        (limits::TEXT_BYTES - 100, false),
        (limits::TEXT_BYTES, true),
    ] {
        let row = serde_json::json!({"question": "a".repeat(repeats), "answer": "b"});
        fs::write(
            &path,
            format!("{{\"question\": \"a\", \"answer\": \"b\"}}\n{row}\n"),
        )
        .unwrap();
        match kvw::dataset::read_jsonl(&path) {
            Ok(dataset) => assert!(!refused && dataset.samples.len() == 2),
            Err(error) => {
                let error = error.to_string();
                let named = error.contains("long.jsonl:2: ") && error.contains("at most 1 MiB");
                assert!(refused && named, "{error}");
            }
        }
    }
}

#[test]
fn no_reader_waits_for_a_pipe_or_reads_a_device() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let dangling = folder.path().join("dangling");
    std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
    let paths = [
        (pipe.as_path(), "a named pipe"),
        (&socket, "a socket"),
        (Path::new("/dev/zero"), "a device"),
        (Path::new("/dev/tty"), ""),
        (&dangling, ""),
    ];
    for (name, _, read) in READERS.iter().chain(OTHERS) {
        for (path, found) in paths {
            let (path, found) = (path.to_owned(), found.to_owned());
            let shown = path.display().to_string();
            let (done, wait) = mpsc::channel();
            let read = *read;
            std::thread::spawn(move || done.send(read(&path)));
            let read = wait.recv_timeout(Duration::from_secs(20));
            let error = read
                .unwrap_or_else(|_| panic!("{name} still waits for {shown}"))
                .unwrap_err();
            // A folder of samples or a model says what it expected in its own words.
            let own = ["parquet", "folder"].contains(name);
            assert!(own || error.contains(&found), "{name}, {shown}: {error}");
        }
    }
}

// ---------------------------------------------------------------- folders

#[test]
fn more_folders_inside_each_other_than_any_model_has_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let deep = |depth: usize| folder.path().join("d/".repeat(depth));
    fs::create_dir_all(deep(limits::FOLDER_DEPTH)).unwrap();
    assert!(Tree::of_folder(folder.path()).is_ok());
    fs::create_dir_all(deep(limits::FOLDER_DEPTH + 1)).unwrap();
    let error = Tree::of_folder(folder.path()).unwrap_err();
    assert!(matches!(error, BundleError::TooMany { .. }), "{error}");
}

// ---------------------------------------------------------------- ready-made inputs

fn zipped(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    use std::io::Write as _;
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for (name, bytes) in entries {
        archive.start_file(name.as_str(), options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn npy(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x02\x00".to_vec();
    bytes.extend(u32::try_from(header.len()).unwrap().to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn feeds_past_a_limit_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sample.npz");
    let refusal = |bytes: Vec<u8>| {
        fs::write(&path, bytes).unwrap();
        let error = message(Feed::read(&path)).unwrap_err();
        assert!(error.contains("sample.npz"), "{error}");
        error
    };
    let one = |name: &str, array: Vec<u8>| zipped(&[(name.to_owned(), array)]);
    let empty = || {
        npy(
            "{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }",
            &[],
        )
    };
    let many = (0..=limits::FEED_TENSORS).map(|index| (format!("{index}.npy"), empty()));
    let error = refusal(zipped(&many.collect::<Vec<_>>()));
    assert!(
        error.contains("expected at most 4096 tensors, found 4097"),
        "{error}"
    );

    let ranks = "1, ".repeat(limits::FEED_RANK + 1);
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({ranks}), }}");
    let error = refusal(one("a.npy", npy(&header, &[0; 4])));
    assert!(error.contains("at most 8 dimensions, found 9"), "{error}");

    let padded = format!("{:width$}", header, width = limits::NPY_HEADER_BYTES + 1);
    let error = refusal(one("a.npy", npy(&padded, &[0; 4])));
    assert!(error.contains("found another header"), "{error}");

    let huge = "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296), }";
    let error = refusal(one("a.npy", npy(huge, &[0; 8])));
    assert!(error.contains("found 8 bytes"), "{error}");

    let object = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }";
    let error = refusal(one("input_ids.npy", npy(object, b"\x80\x04K\x01.")));
    assert!(error.contains("a pickle, which is never read"), "{error}");
    let error = refusal(one("archive/data.pkl", b"\x80\x02}q\x00.".to_vec()));
    assert!(
        error.contains("a pickle (torch.save), which is never read"),
        "{error}"
    );
    let error = refusal(b"\x80\x04K\x01.".to_vec());
    assert!(error.contains("a pickle, which is never read"), "{error}");
}

// ---------------------------------------------------------------- parquet

fn parquet_of(
    path: &Path,
    physical: PhysicalType,
    repetition: Repetition,
    write: impl FnOnce(&mut parquet::file::writer::SerializedColumnWriter<'_>),
) {
    let mut column = Type::primitive_type_builder("caption", physical).with_repetition(repetition);
    if physical == PhysicalType::BYTE_ARRAY {
        column = column.with_converted_type(parquet::basic::ConvertedType::UTF8);
    }
    let fields = vec![column.build().unwrap().into()];
    let schema = Type::group_type_builder("schema").with_fields(fields);
    let file = File::create(path).unwrap();
    let mut writer =
        SerializedFileWriter::new(file, schema.build().unwrap().into(), Default::default());
    let writer = writer.as_mut().unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    write(&mut column);
    column.close().unwrap();
    group.close().unwrap();
    writer.finish().unwrap();
}

fn nulls(path: &Path, rows: usize) {
    parquet_of(path, PhysicalType::INT32, Repetition::OPTIONAL, |column| {
        let levels = vec![0; rows.min(1_000_000)];
        for _ in 0..rows.div_ceil(1_000_000) {
            let column = column.typed::<Int32Type>();
            column.write_batch(&[], Some(&levels), None).unwrap();
        }
    });
}

fn open_table(path: &Path) -> DatasetError {
    let address = format!("clear:{}", path.display());
    dataset::read(Path::new(&address), &ReadOptions::default()).unwrap_err()
}

#[test]
fn a_parquet_file_that_claims_more_than_is_held_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.parquet");
    nulls(&path, 10);
    let file = File::open(&path).unwrap();
    let honest = ParquetMetaDataReader::new()
        .parse_and_finish(&file)
        .unwrap();
    let groups = honest.row_groups().iter().map(|group| {
        let size = i64::try_from(limits::TABLE_BYTES + 1).unwrap();
        let lie: RowGroupMetaData = group
            .clone()
            .into_builder()
            .set_total_byte_size(size)
            .build()
            .unwrap();
        lie
    });
    let lie = ParquetMetaData::new(honest.file_metadata().clone(), groups.collect());
    let mut bytes = fs::read(&path).unwrap();
    let footer = u32::from_le_bytes(*bytes[..bytes.len() - 4].last_chunk().unwrap());
    bytes.truncate(bytes.len() - 8 - footer as usize);
    ParquetMetaDataWriter::new(&mut bytes, &lie)
        .finish()
        .unwrap();
    fs::write(&path, bytes).unwrap();
    let error = open_table(&path).to_string();
    assert!(
        error.contains("it claims 8589934593 bytes of rows"),
        "{error}"
    );
}

#[test]
fn a_small_parquet_file_cannot_become_a_large_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.parquet");
    // Five million rows of nothing.
    nulls(&path, 5_000_000);
    assert!(fs::metadata(&path).unwrap().len() < 1 << 16);
    let error = open_table(&path);
    assert!(matches!(error, DatasetError::TooLarge { .. }), "{error}");
    // One text of a quarter of a megabyte, 2,400 times.
    parquet_of(
        &path,
        PhysicalType::BYTE_ARRAY,
        Repetition::REQUIRED,
        |column| {
            let text = ByteArray::from("x".repeat(1 << 18).into_bytes());
            let column = column.typed::<ByteArrayType>();
            for _ in 0..2400 {
                column
                    .write_batch(std::slice::from_ref(&text), None, None)
                    .unwrap();
            }
        },
    );
    assert!(fs::metadata(&path).unwrap().len() < 2 << 20);
    let error = open_table(&path);
    assert!(matches!(error, DatasetError::TooLarge { .. }), "{error}");
}

#[test]
fn a_parquet_file_of_nested_columns_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.parquet");
    let mut field = Type::primitive_type_builder("x", PhysicalType::INT32)
        .with_repetition(Repetition::REQUIRED)
        .build()
        .unwrap();
    for _ in 0..limits::TABLE_DEPTH {
        field = Type::group_type_builder("x")
            .with_repetition(Repetition::REQUIRED)
            .with_fields(vec![field.into()])
            .build()
            .unwrap();
    }
    let schema = Type::group_type_builder("schema").with_fields(vec![field.into()]);
    let file = File::create(&path).unwrap();
    SerializedFileWriter::new(file, schema.build().unwrap().into(), Default::default())
        .unwrap()
        .close()
        .unwrap();
    let error = open_table(&path).to_string();
    assert!(
        error.contains("at most 32 columns inside each other"),
        "{error}"
    );
}

// ---------------------------------------------------------------- children

#[test]
fn a_reader_past_its_budget_is_a_fault_and_no_more() {
    // From here on, the readers of this process run in children: the other tests pass with either.
    confine::enable(env!("CARGO_BIN_EXE_kvw").into());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.parquet");
    let read = |name: &str, memory: u64, seconds: u64| {
        let file = File::open(&path).unwrap();
        let here = |_, _: confine::Sink<'_>| panic!("read in this process");
        let mut items = 0;
        let read = confine::read(name, here, file, Budget { memory, seconds }, &mut |_| {
            items += 1;
            Ok(())
        });
        (read, items)
    };
    nulls(&path, 1000);
    let (whole, items) = read("parquet", 64 << 20, 10);
    assert!(whole.is_ok() && items == 1000, "{whole:?}, {items}");
    nulls(&path, 12_000_000);
    let (slow, _) = read("parquet", 1 << 30, 1);
    assert!(matches!(slow, Err(Fault::Time(1))), "{slow:?}");
    parquet_of(
        &path,
        PhysicalType::BYTE_ARRAY,
        Repetition::REQUIRED,
        |column| {
            let text = ByteArray::from("x".repeat(64 << 20).into_bytes());
            let column = column.typed::<ByteArrayType>();
            column.write_batch(&[text], None, None).unwrap();
        },
    );
    let (large, _) = read("parquet", 32 << 20, 10);
    assert!(matches!(large, Err(Fault::Memory(_))), "{large:?}");
    fs::write(&path, format!("[{}", "[],".repeat(8 << 20))).unwrap();
    let (other, _) = read("tokenizer", 32 << 20, 10);
    assert!(other.is_err(), "{other:?}");
    let (nobody, _) = read("nobody", 32 << 20, 10);
    assert!(matches!(nobody, Err(Fault::Died(_))), "{nobody:?}");
}

#[test]
fn templates_and_tokenizers_that_explode_do_so_in_a_child() {
    confine::enable(env!("CARGO_BIN_EXE_kvw").into());
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    fs::write(file("config.json"), r#"{"model_type": "x"}"#).unwrap();
    let template = "{% set n = namespace(v=[1]) %}{% for i in range(60) %}{% set n.v = n.v + n.v %}{% endfor %}{{ n.v }}";
    fs::write(file("chat_template.jinja"), template).unwrap();
    let error = message(ChatTemplate::open(&ModelDir::open(folder.path()).unwrap())).unwrap_err();
    assert!(error.contains("reading it takes more than"), "{error}");

    let whole =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle/qwen2_vl/model/tokenizer.json");
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&fs::read(whole).unwrap()).unwrap();
    let path = file("tokenizer.json");
    fs::write(&path, tokenizer.to_string()).unwrap();
    assert!(Tokenizer::open(&path).is_ok());
    let doubling =
        serde_json::json!({"type": "Replace", "pattern": {"Regex": "(.)"}, "content": "xxxxxxxx"});
    tokenizer["normalizer"] =
        serde_json::json!({"type": "Sequence", "normalizers": vec![doubling; 12]});
    fs::write(&path, tokenizer.to_string()).unwrap();
    let error = message(Tokenizer::open(&path)).unwrap_err();
    assert!(
        error.contains("tokenizer.json") && error.contains("reading it takes more than"),
        "{error}"
    );
}
