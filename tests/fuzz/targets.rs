//! The targets: every reader of somebody else's bytes, the good inputs that its mutants come from, and what it
//! promises whatever it is given.
//!
//! In: a target's name, a folder that is its alone. Out: its good inputs, and a closure that reads one input and
//! panics where a promise does not hold. Two harnesses drive them: `main.rs` beside this file, on stable, and
//! `tools/fuzz`, by coverage.

use std::fs;
use std::path::{Path, PathBuf};

#[cfg(feature = "runtime")]
use kvw::check::Policy;
#[cfg(feature = "runtime")]
use kvw::dataset::{self, ReadOptions};
#[cfg(feature = "runtime")]
use kvw::eval::Evidence;
#[cfg(feature = "runtime")]
use kvw::limits;
#[cfg(feature = "runtime")]
use kvw::preprocess::template::ChatTemplate;
#[cfg(feature = "runtime")]
use kvw::preprocess::{Feed, ModelDir, Tokenizer, image};
#[cfg(feature = "runtime")]
use kvw::sweep::Sweep;

use kvw::bundle::Bundle;
use kvw::edit::{self, Receipt};
use kvw::files::contain::Root;
use kvw::files::{json, safetensors};
use kvw::kvw::{load_coefficients, load_part, load_plan, save_coefficients, save_plan};
use kvw::onnx::{Limits, ModelFile, Storage, tensors};
use kvw::provenance::{key::PrivateKey, key::PublicKey, model_signing, sums};

/// Reads an input: the path where it lies, and its bytes. Panics where a promise does not hold.
type Read = dyn Fn(&Path, &[u8]);

/// Makes a target ready in a folder.
type Open = fn(&Path) -> Target;

/// A reader, ready to be tried.
pub(crate) struct Target {
    /// Good inputs, and those that once failed (`fixtures/fuzz/NAME`).
    pub(crate) seeds: Vec<Vec<u8>>,
    /// What means something to the reader, for mutators to put in.
    pub(crate) words: &'static [&'static str],
    /// Where an input must lie when it is read.
    pub(crate) input: PathBuf,
    /// What is tried.
    pub(crate) read: Box<Read>,
}

impl Target {
    fn new(
        input: PathBuf,
        seeds: impl Into<Vec<Vec<u8>>>,
        words: &'static [&'static str],
        read: impl Fn(&Path, &[u8]) + 'static,
    ) -> Target {
        Target {
            seeds: seeds.into(),
            words,
            input,
            read: Box::new(read),
        }
    }
}

/// The targets by name, each with what makes it ready in a folder.
pub(crate) const TARGETS: &[(&str, Open)] = &[
    ("onnx_files", onnx_files),
    ("external_locations", external_locations),
    ("plans_and_coefficients", plans_and_coefficients),
    #[cfg(feature = "runtime")]
    ("ready_made_inputs", ready_made_inputs),
    ("json_trees", json_trees),
    #[cfg(feature = "runtime")]
    ("model_folders", model_folders),
    #[cfg(feature = "runtime")]
    ("tokenizers", tokenizers),
    #[cfg(feature = "runtime")]
    ("chat_templates", chat_templates),
    #[cfg(feature = "runtime")]
    ("pictures", pictures),
    #[cfg(feature = "runtime")]
    ("jsonl", jsonl),
    #[cfg(feature = "runtime")]
    ("parquet_tables", parquet_tables),
    #[cfg(feature = "runtime")]
    ("policies", policies),
    #[cfg(feature = "runtime")]
    (
        "evaluations_sweeps_and_receipts",
        evaluations_sweeps_and_receipts,
    ),
    ("signatures_sums_and_keys", signatures_sums_and_keys),
    ("journals", journals),
];

/// The target `name`, ready in `folder`, which it has for itself.
pub(crate) fn open(name: &str, folder: &Path) -> Target {
    fs::create_dir_all(folder).unwrap();
    let (_, open) = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let mut target = open(folder);
    if let Ok(failed) = fs::read_dir(fixtures("fuzz").join(name)) {
        let mut failed: Vec<_> = failed.map(|entry| entry.unwrap().path()).collect();
        failed.sort();
        let failed = failed.iter().map(|path| fs::read(path).unwrap());
        target.seeds.extend(failed);
    }
    target
}

fn fixture(path: &str) -> Vec<u8> {
    fs::read(fixtures(path)).unwrap()
}

/// A path in the repository's `fixtures`: in the package's folder or in one above.
fn fixtures(path: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = package.ancestors().map(|folder| folder.join("fixtures"));
    folders.find(|folder| folder.is_dir()).unwrap().join(path)
}

fn onnx_files(folder: &Path) -> Target {
    let seeds = [
        fixture("exports/genai-qwen2-fp16/model.onnx"),
        fixture("exports/genai-phi2-fp32/model.onnx"),
        fixture("exports/genai-layout-qwen2_5_vl/model.onnx"),
    ];
    Target::new(
        folder.join("model.onnx"),
        seeds,
        &["If", "MatMul", "/etc/passwd", "location"],
        |path, _| {
            let Ok(model) = ModelFile::open(path, &Limits::default()) else {
                return;
            };
            for tensor in tensors(model.proto()) {
                let Ok(storage) = model.storage(tensor) else {
                    continue;
                };
                if let Storage::External { file, .. } = &storage {
                    assert!(file.starts_with(model.root().boundary()), "{file:?}");
                }
                if let Storage::Inline(span) = storage {
                    assert!(span.end().unwrap() <= model.size());
                }
                let _ = model.bytes(tensor);
            }
            if let Ok(bundle) = Bundle::open(path) {
                let _ = edit::inspect(&bundle);
            }
        },
    )
}

fn external_locations(folder: &Path) -> Target {
    let model = folder.join("model");
    fs::create_dir_all(model.join("onnx")).unwrap();
    fs::write(model.join("weights"), "w").unwrap();
    fs::write(folder.join("secret"), "s").unwrap();
    let link = |target: &str, name: &str| {
        let name = model.join(name);
        if name.symlink_metadata().is_err() {
            std::os::unix::fs::symlink(target, name).unwrap();
        }
    };
    link("../secret", "up");
    link("..", "parent");
    link("/", "root");
    let root = Root::of(&model).unwrap();
    let boundary = root.boundary().to_owned();
    let seeds = [
        "weights",
        "onnx/../weights",
        "./weights",
        "up",
        "parent/secret",
        "../secret",
        "root/etc/passwd",
    ];
    let seeds = seeds.map(|seed| seed.as_bytes().to_vec());
    Target::new(
        folder.join("input"),
        seeds,
        &[
            "..",
            "/",
            "\\",
            "parent/",
            "root/",
            "up",
            "\u{0}",
            "C:",
            "*/_ORT_MEM_ADDR_/*",
        ],
        move |_, data| {
            let Ok(location) = std::str::from_utf8(data) else {
                return;
            };
            for base in ["", "onnx"] {
                if let Ok(opened) = root.open_from(base, location) {
                    assert!(
                        opened.path.starts_with(&boundary),
                        "{location:?} → {:?}",
                        opened.path
                    );
                    assert!(opened.file.metadata().unwrap().is_file());
                }
            }
        },
    )
}

/// A plan and coefficients as kvw writes them.
fn written(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    use kvw::graph::Moment;
    use kvw::kvw::{Coefficients, Plan};
    let layer = "2".parse();
    let path = folder.join("seed");
    let layers = [(layer.unwrap_or_else(|_| panic!("a layer")), 5)];
    let gates = [(layers[0].0, vec![0.5, 1.0, 1e-9, 0.25, 0.75])];
    let plan = Plan {
        gates: gates.into(),
        rule: "kvw".into(),
        parameters: serde_json::json!({"gamma": 0.4, "layers": "2-2"}),
        steps: 3,
    };
    save_plan(
        &path,
        &plan,
        serde_json::json!({"model": {"layers": []}}),
        true,
    )
    .unwrap();
    let of_plan = fs::read(&path).unwrap();
    let none = Coefficients::new(Moment::Absolute, &layers);
    save_coefficients(&path, &none, serde_json::json!({"data": "x"}), true).unwrap();
    (of_plan, fs::read(&path).unwrap())
}

fn plans_and_coefficients(folder: &Path) -> Target {
    let (plan, coefficients) = written(folder);
    Target::new(
        folder.join("forget.plan"),
        [plan, coefficients],
        &[
            "\"F32\"",
            "\"shape\"",
            "18446744073709551615",
            "layers.2.gate",
        ],
        |path, data| {
            if let Ok((plan, _)) = load_plan(path) {
                assert!(plan.gates.values().flatten().all(|gate| gate.is_finite()));
            }
            let _ = load_coefficients(path);
            let _ = load_part(path);
            if safetensors::check_header(data).is_ok() {
                assert!(data.len() >= 8);
            }
        },
    )
}

#[cfg(feature = "runtime")]
fn ready_made_inputs(folder: &Path) -> Target {
    let seeds = [
        fixture("layouts/feeds/npz/0.npz"),
        fixture("layouts/feeds/safetensors/0.safetensors"),
    ];
    Target::new(
        folder.join("input"),
        seeds,
        &["'descr'", "(4294967296, 4294967296)", "|O", ".npy"],
        |path, _| {
            if let Ok(feed) = Feed::read(path) {
                assert_eq!(feed.input_ids.len(), feed.answer_mask.len());
            }
        },
    )
}

fn json_trees(folder: &Path) -> Target {
    let seeds = [
        "config.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ]
    .map(|name| fixture(&format!("oracle/qwen2_vl/model/{name}")));
    const WORDS: &[&str] = &[
        "[",
        "]",
        "{",
        "}",
        "\"a\":",
        ",",
        "null",
        "1e999",
        "\\ud800",
        "0,0,0,0,0,0",
    ];
    Target::new(folder.join("input"), seeds, WORDS, |_, data| {
        let ours = json::read_tree(data);
        let theirs = serde_json::from_slice::<serde_json::Value>(data);
        match (&ours, &theirs) {
            (Ok(ours), Ok(theirs)) => assert_eq!(ours, theirs),
            (Ok(_), Err(error)) => panic!("read what serde_json refuses: {error}"),
            (Err(error), Ok(_)) => {
                let text = error.to_string();
                assert!(
                    text.contains("twice") || text.contains("many times"),
                    "{text}"
                );
            }
            (Err(_), Err(_)) => {}
        }
    })
}

#[cfg(feature = "runtime")]
fn model_folders(folder: &Path) -> Target {
    fs::create_dir_all(folder.join("onnx")).unwrap();
    let model = fixture("oracle/qwen2_vl/model/onnx/embed_tokens.onnx");
    fs::write(folder.join("onnx/embed_tokens.onnx"), model).unwrap();
    let seeds = [
        "oracle/qwen2_vl",
        "oracle/llava",
        "families/gemma3",
        "families/phi3_v",
        "families/idefics3",
    ]
    .map(|family| fixture(&format!("{family}/model/config.json")));
    let models = folder.to_owned();
    Target::new(
        folder.join("config.json"),
        seeds,
        &["text_config", "-1", "1e308", "null", "99999999999"],
        move |_, _| {
            let _ = Bundle::open(&models);
            let _ = kvw::preprocess::open_family(&models).map(drop);
        },
    )
}

#[cfg(feature = "runtime")]
fn tokenizers(folder: &Path) -> Target {
    let seeds = [
        fixture("oracle/qwen2_vl/model/tokenizer.json"),
        fixture("families/gemma3/model/tokenizer.json"),
    ];
    Target::new(
        folder.join("input"),
        seeds,
        &[
            "\"Regex\":\"(a+)+$\"",
            "\"merges\":[[\"\",\"\"]]",
            "4294967295",
        ],
        |path, _| {
            if let Ok(tokenizer) = Tokenizer::open(path) {
                let text = "What is in the picture? \u{e9}\u{1f600} <|im_start|>";
                if let Ok(encoded) = tokenizer.encode(text, true) {
                    assert!(encoded.offsets.iter().all(|range| range.start <= range.end));
                    let _ = tokenizer.decode(&encoded.ids, false);
                }
            }
        },
    )
}

#[cfg(feature = "runtime")]
fn chat_templates(folder: &Path) -> Target {
    fs::write(folder.join("config.json"), r#"{"model_type": "x"}"#).unwrap();
    let seeds = [
        "oracle/qwen2_vl",
        "oracle/llava",
        "families/mllama",
        "families/smolvlm",
    ]
    .map(|family| fixture(&format!("{family}/model/chat_template.jinja")));
    let model = ModelDir::open(folder).unwrap();
    const WORDS: &[&str] = &[
        "{{",
        "}}",
        "{%",
        "%}",
        "for x in ",
        "range(1000000000)",
        "* 1000000000",
        "| tojson(indent=99)",
        "| indent(99999999)",
        "messages",
        "[::-1]",
        "(",
        ")",
        "{% set ",
    ];
    let messages = serde_json::json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]);
    Target::new(
        folder.join("chat_template.jinja"),
        seeds,
        WORDS,
        move |_, _| {
            if let Ok(template) = ChatTemplate::open(&model)
                && let Ok(text) = template.render(&messages, true)
            {
                // 64 bytes a unit of fuel.
                assert!(text.len() as u64 <= 64 * limits::TEMPLATE_FUEL + limits::TEMPLATE_BYTES);
            }
        },
    )
}

#[cfg(feature = "runtime")]
fn pictures(folder: &Path) -> Target {
    let seeds = [
        "progressive.jpg",
        "subsampled.jpg",
        "cmyk.jpg",
        "lossy_alpha.webp",
        "lossless.webp",
        "interlaced.png",
        "rgba_16_bit.png",
        "palette_transparent.png",
        "exif_6.jpg",
        "xmp_6.png",
    ]
    .map(|name| fixture(&format!("processor/qwen2_vl/images/{name}")));
    Target::new(
        folder.join("input"),
        seeds,
        &["IHDR", "IDAT", "Exif", "VP8X"],
        |path, data| {
            if let Ok(pixels) = image::decode_rgb(path, data) {
                assert!(pixels.len() as u64 <= 3 * limits::IMAGE_PIXELS);
            }
        },
    )
}

#[cfg(feature = "runtime")]
fn jsonl(folder: &Path) -> Target {
    let image = fixtures("oracle/data/images/p000_0.png");
    let seed = format!(
        "{{\"image\": {image:?}, \"question\": \"q\", \"answer\": \"a b\", \"name\": \"a\", \"facts\": {{\"job\": \"b\"}}, \"options\": [\"x\", \"y\"], \"correct\": 1}}\n"
    );
    Target::new(
        folder.join("data.jsonl"),
        [seed.into_bytes(), fixture("oracle/data/retain.jsonl")],
        &["\n", "null", "[]", "{}", "\"id\": 1,", "/dev/zero"],
        |path, _| {
            if let Ok(data) = dataset::read_jsonl(path) {
                assert!(
                    data.samples
                        .iter()
                        .all(|sample| !sample.answer.trim().is_empty())
                );
            }
        },
    )
}

#[cfg(feature = "runtime")]
fn parquet_tables(folder: &Path) -> Target {
    let seeds = ["benchmarks/clear/forget05/train-00000-of-00002.parquet"].map(fixture);
    Target::new(folder.join("train.parquet"), seeds, &["PAR1"], |path, _| {
        let address = format!("clear:{}", path.display());
        let _ = dataset::read(Path::new(&address), &ReadOptions { max_bad_rows: 9 });
    })
}

#[cfg(feature = "runtime")]
fn policies(folder: &Path) -> Target {
    const WORDS: &[&str] = &[
        "[[",
        "]]",
        "= nan",
        "= 1e999",
        "[thresholds]",
        "'''",
        "a.a.a.a = ",
    ];
    Target::new(
        folder.join("input"),
        [fixture("demo/policy.toml")],
        WORDS,
        |path, data| {
            let _ = Policy::read(path);
            if let Ok(text) = std::str::from_utf8(data) {
                let _ = Policy::parse("policy.toml", text);
            }
        },
    )
}

/// A JSON file with at most the first two items of every list: the rest are more of the same, and slow.
#[cfg(feature = "runtime")]
fn shortened(json: &[u8]) -> Vec<u8> {
    fn shorten(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Array(items) => {
                items.truncate(2);
                items.iter_mut().for_each(shorten);
            }
            serde_json::Value::Object(members) => members.values_mut().for_each(shorten),
            _ => {}
        }
    }
    let mut value = serde_json::from_slice(json).unwrap();
    shorten(&mut value);
    serde_json::to_vec(&value).unwrap()
}

#[cfg(feature = "runtime")]
fn evaluations_sweeps_and_receipts(folder: &Path) -> Target {
    let seeds = [
        shortened(&fixture("demo/reference/sweep.json")),
        shortened(&fixture("demo/retrained.evaluation.json")),
    ];
    const WORDS: &[&str] = &["null", "[]", "{}", "-1", "1e308", "\"schema_version\": 99,"];
    Target::new(folder.join("input"), seeds, WORDS, |path, _| {
        let _ = Evidence::read(path);
        let _ = Sweep::read(path);
        let _ = Receipt::read(path);
    })
}

fn signatures_sums_and_keys(folder: &Path) -> Target {
    let key = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEp6h3pEYkVlTNAsCfhwyP9c5Cy5rk\nGBVvPmMZCGbHDpIn4r0Tb1c4sTQH7HRM1uvM5ODIXTVPpXGx6WoJIxkpNQ==\n-----END PUBLIC KEY-----\n";
    let signature = r#"{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"x"},"tlogEntries":[]},"dsseEnvelope":{"payload":"e30=","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":"AAAA","keyid":""}]}}"#;
    let line = format!(
        "{}  config.json\n{}  onnx/model.onnx\n",
        "a".repeat(64),
        "0".repeat(64)
    );
    let seeds = [key, signature, &line].map(|seed| seed.as_bytes().to_vec());
    Target::new(
        folder.join("input"),
        seeds,
        &["../", "e30=", "\n", "-----END", "\"a\":1,"],
        |path, data| {
            let _ = model_signing::read(path);
            let _ = PublicKey::read(path);
            let _ = PrivateKey::read(path);
            if let Ok(text) = std::str::from_utf8(data) {
                let _ = sums::decode(path, text);
            }
        },
    )
}

/// A journal with the digest that its bytes ask for: else every damaged one ends at the digest.
fn sealed(mut journal: Vec<u8>) -> Vec<u8> {
    let number = |bytes: &[u8]| usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap()));
    let Some(footer) = journal.len().checked_sub(56).filter(|at| *at >= 16) else {
        return journal;
    };
    let index_at = number(&journal[footer..footer + 8])
        .unwrap_or(0)
        .clamp(16, footer);
    let mut hasher = kvw::files::Sha256Hasher::default();
    hasher.update(&journal[..16]);
    let mut at = 16;
    while at + 80 <= index_at {
        hasher.update(&journal[at..at + 80]);
        let length = u32::from_le_bytes(journal[at + 4..at + 8].try_into().unwrap());
        at = at.saturating_add(80).saturating_add(length as usize);
    }
    hasher.update(&journal[index_at..footer + 16]);
    let digest = hasher.finish();
    journal[footer + 16..footer + 48].copy_from_slice(digest.as_bytes());
    journal
}

fn journals(folder: &Path) -> Target {
    use kvw::files::journal::{self, Index, Journal, JournalFile, JournalWriter, Range};
    use kvw::files::{FolderLock, Sha256};
    let secret = folder.join("secret");
    let folder = folder.join("model");
    fs::create_dir_all(&folder).unwrap();
    let (input, model) = (folder.join(journal::JOURNAL), folder.join("a.bin"));
    let _ = fs::remove_file(&input);
    let (old, new) = ([1; 700], [2; 700]);
    fs::write(&secret, old).unwrap();
    fs::write(&model, old).unwrap();
    let up = folder.join("up");
    if up.symlink_metadata().is_err() {
        std::os::unix::fs::symlink("../secret", up).unwrap();
    }
    let lock = FolderLock::take(&folder).unwrap();
    let mut staged = journal::begin(&folder, &lock).unwrap();
    let mut writer = JournalWriter::begin(&mut staged).unwrap();
    for (offset, len) in [(0, 100), (512, 188)] {
        let range = Range {
            file: 0,
            offset,
            old: Sha256::of_bytes(&old[..len]),
            new: Sha256::of_bytes(&new[..len]),
        };
        writer.record(&range, &new[..len]).unwrap();
    }
    let mut index = Index {
        files: vec![JournalFile {
            path: "a.bin".into(),
            bytes: 700,
        }],
        whole: Default::default(),
    };
    index.set("kvw.json", Some(b"{}"));
    index.set("model.sig", None);
    writer.finish(&index).unwrap();
    staged.commit().unwrap();
    let seed = fs::read(&input).unwrap();
    const WORDS: &[&str] = &[
        "../secret",
        "up",
        "/etc/passwd",
        "\"a.bin\"",
        "null",
        "18446744073709551615",
        "kvw.json",
    ];
    Target::new(input, [seed], WORDS, move |path, data| {
        for journal in [data.to_vec(), sealed(data.to_vec())] {
            fs::write(&model, old).unwrap();
            fs::write(path, journal).unwrap();
            let _ = Journal::open(path);
            let rolled = journal::roll_forward(&folder, &lock);
            assert_eq!(fs::read(&secret).unwrap(), old);
            let now = fs::read(&model).unwrap();
            assert_eq!(now.len(), old.len());
            assert!(rolled.is_ok() || now == old, "{rolled:?}: half a patch");
        }
    })
}
