//! What reading a file may cost: every limit, its reason, and the test that is hostile to it.
//!
//! A limit is a constant here, and a row of [`ALL`], from which the table of `docs/security.md` is
//! made (`tests/limits.rs` compares them). Limits on the *values* of a configuration (tiles, patch
//! sizes) stand with the family that reads them.
//!
//! Where bytes on disk and bytes in memory differ, what a file would take is measured before it is built, and
//! the limit follows the file's size: JSON trees ([`crate::files::json`]) may take [`AMPLIFICATION`] times their
//! bytes, ONNX graphs ([`crate::onnx`]) without their weights [`GRAPH_AMPLIFICATION`] times, and [`ALLOWANCE`]
//! more.

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Things: files, pixels, levels; the limit's description says which.
    Count,
}

/// One limit.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// The constant's name.
    pub name: &'static str,
    /// What is limited.
    pub of: &'static str,
    /// The largest that is accepted.
    pub value: u64,
    /// What [`Limit::value`] counts.
    pub unit: Unit,
    /// Why not less, and why not more.
    pub why: &'static str,
    /// The test that goes past it.
    pub test: &'static str,
}

impl std::fmt::Display for Limit {
    /// The value for people: `16 MiB`, `100,000`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        let whole = |shift: u32| self.value > 0 && self.value.trailing_zeros() >= shift;
        match units.iter().find(|(shift, _)| whole(*shift)) {
            Some((shift, unit)) if self.unit == Unit::Bytes => {
                write!(f, "{} {unit}", self.value >> shift)
            }
            _ => {
                let digits = self.value.to_string();
                for (index, digit) in digits.chars().enumerate() {
                    if index > 0 && (digits.len() - index).is_multiple_of(3) {
                        write!(f, ",")?;
                    }
                    write!(f, "{digit}")?;
                }
                match self.unit {
                    Unit::Bytes => write!(f, " bytes"),
                    Unit::Count => Ok(()),
                }
            }
        }
    }
}

macro_rules! limits {
    ($($(#[doc = $why:literal])+ $name:ident: $type:ty = $value:expr, $unit:ident, $of:literal, $test:literal;)+) => {
        $(
            #[doc = concat!("Limit of ", $of, ".\n\n")]
            $(#[doc = $why])+
            pub const $name: $type = $value;
        )+

        /// Every limit, in the order in which a model folder, a data set and what `kvw` writes are read.
        pub const ALL: &[Limit] = &[$(Limit {
            name: stringify!($name),
            of: $of,
            value: $name as u64,
            unit: Unit::$unit,
            why: concat!($($why),+),
            test: $test,
        }),+];
    };
}

limits! {
    /// No model has more.
    FOLDER_FILES: usize = 100_000, Count, "files and folders in a model folder",
        "more_files_than_any_model_has_are_refused";
    /// Nor deeper ones.
    FOLDER_DEPTH: usize = 32, Count, "folders inside each other",
        "more_folders_inside_each_other_than_any_model_has_are_refused";
    /// Linux's own limit on a path.
    LOCATION_BYTES: usize = 4096, Bytes, "an external data location",
        "no_hostile_location_opens_anything";

    /// The largest real decoder seen (80 layers, dynamo export with metadata) takes some 100 MB. Weights
    /// stay in the map and do not count.
    GRAPH_BYTES: u64 = 512 << 20, Bytes, "a decoded ONNX graph",
        "a_bomb_of_empty_messages_is_refused_by_its_size";
    /// prost's own bound.
    GRAPH_DEPTH: usize = 100, Count, "messages inside each other in an ONNX file",
        "deep_nesting_is_refused";
    /// A hundred layers of a hundred nodes are a tenth. Beyond it calls stay calls.
    FUNCTION_NODES: usize = 100_000, Count, "nodes of a graph with its functions put in",
        "functions_that_grow_exponentially_are_left_as_they_are";
    /// Encoded bytes of all bodies that are put in. Beyond it calls stay calls.
    FUNCTION_BYTES: usize = 64 << 20, Bytes, "function bodies that are put into a graph",
        "functions_that_grow_exponentially_are_left_as_they_are";
    /// The standard forbids recursion. Beyond it calls stay calls.
    FUNCTION_DEPTH: usize = 16, Count, "function calls inside each other",
        "functions_that_grow_exponentially_are_left_as_they_are";

    /// Real configurations take kilobytes, the receipt of a large model some 100.
    JSON_BYTES: u64 = 16 << 20, Bytes, "a JSON file: configuration, receipt, signature, statement",
        "json_past_a_limit_is_refused_by_name";
    /// serde_json's own bound.
    JSON_DEPTH: usize = 127, Count, "JSON values inside each other",
        "json_past_a_limit_is_refused_by_name";
    /// The largest in use (262,144 words) has 33 MB.
    TOKENIZER_BYTES: u64 = 128 << 20, Bytes, "`tokenizer.json`",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// Beside 32 times the file's bytes: one of 12 MB takes 25 times that.
    TOKENIZER_MEMORY: u64 = 64 << 20, Bytes, "memory of the child that loads a small `tokenizer.json`",
        "a_reader_past_its_budget_is_a_fault_and_no_more";
    /// The longest in use (tool-calling models) have 30 kB.
    TEMPLATE_BYTES: u64 = 1 << 20, Bytes, "a chat template",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// Instructions, and 64-byte units of memory, of one rendering. A 20-turn conversation takes 10,000.
    TEMPLATE_FUEL: u64 = 1_000_000, Count, "steps of a chat template",
        "a_template_that_runs_forever_or_eats_memory_is_stopped";
    /// Macros and blocks inside each other.
    TEMPLATE_DEPTH: usize = 64, Count, "calls inside each other in a chat template",
        "a_template_that_runs_forever_or_eats_memory_is_stopped";
    /// Nobody indents further, and `tojson(indent=1e9)` takes gigabytes.
    TEMPLATE_INDENT: usize = 16, Count, "spaces by which `tojson` indents",
        "a_template_that_runs_forever_or_eats_memory_is_stopped";
    /// A conversation takes a hundredth.
    TEMPLATE_MEMORY: u64 = 48 << 20, Bytes, "memory of the child that renders a chat template first",
        "templates_and_tokenizers_that_explode_do_so_in_a_child";
    /// A conversation takes a thousandth.
    TEMPLATE_SECONDS: u64 = 10, Count, "processor seconds of that child",
        "templates_and_tokenizers_that_explode_do_so_in_a_child";

    /// A million long captions fit; a model file named by mistake does not.
    JSONL_BYTES: u64 = 512 << 20, Bytes, "a JSONL file",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// A prompt of 100,000 tokens takes half of it. Tokenizers take some thousand bytes for each.
    TEXT_BYTES: usize = 1 << 20, Bytes, "a row of a JSONL file, a text of a parquet file",
        "a_text_longer_than_any_prompt_is_refused";
    /// No camera writes more.
    IMAGE_BYTES: u64 = 256 << 20, Bytes, "an encoded picture",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// 8192 × 8192; processors scale far below that. Checked in the header, before pixels are allocated.
    IMAGE_PIXELS: u64 = 1 << 26, Count, "pixels of a picture",
        "an_image_is_refused_by_its_header_before_its_pixels_are_allocated";
    /// Rows are held in memory, pictures included. CLEAR's largest set has some 0.7 GB.
    TABLE_BYTES: u64 = 8 << 30, Bytes, "the rows of a parquet data set",
        "a_parquet_file_that_claims_more_than_is_held_is_refused";
    /// Beside 64 times the file's bytes: rows may repeat a picture that the file holds once.
    TABLE_ALLOWANCE: u64 = 512 << 20, Bytes, "the rows of a small parquet file",
        "a_small_parquet_file_cannot_become_a_large_one";
    /// `datasets` nests lists and structs some four deep.
    TABLE_DEPTH: usize = 32, Count, "columns inside each other in a parquet file",
        "a_parquet_file_of_nested_columns_is_refused";
    /// Beside four times the file's bytes: row groups of thousands of pictures.
    CONFINED_BYTES: u64 = 512 << 20, Bytes, "memory of the child that reads a parquet file",
        "a_reader_past_its_budget_is_a_fault_and_no_more";
    /// Beside a second for each 4 MiB of the file. Reading takes a hundredth.
    CONFINED_SECONDS: u64 = 60, Count, "processor seconds of a child that reads a file",
        "a_reader_past_its_budget_is_a_fault_and_no_more";

    /// A prompt of 16,000 tokens in embeddings of 8,192 float32 numbers is half of it.
    FEED_BYTES: u64 = 1 << 30, Bytes, "a file of ready-made inputs, and what is in it",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// More than fit into anybody's patience.
    FEED_FILES: usize = 1_000_000, Count, "files of ready-made inputs",
        "a_folder_of_more_feeds_than_allowed_is_refused";
    /// More than any decoder has inputs.
    FEED_TENSORS: usize = 4096, Count, "tensors in a file of ready-made inputs",
        "feeds_past_a_limit_are_refused_by_name";
    /// More than any tensor has.
    FEED_RANK: usize = 8, Count, "dimensions of a ready-made input",
        "feeds_past_a_limit_are_refused_by_name";
    /// numpy writes some hundred bytes.
    NPY_HEADER_BYTES: usize = 16 << 10, Bytes, "the header of an array in an `.npz` file",
        "feeds_past_a_limit_are_refused_by_name";

    /// A plan of 200 layers takes some 0.6 MB.
    SAFETENSORS_HEADER_BYTES: u64 = 16 << 20, Bytes, "the header of a safetensors file",
        "a_safetensors_header_past_its_limits_is_refused";
    /// All answers of some 100,000 samples.
    EVALUATION_BYTES: u64 = 256 << 20, Bytes, "an evaluation file",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// Summaries of many thousand points.
    SWEEP_BYTES: u64 = 256 << 20, Bytes, "the file of a sweep",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// Written by hand.
    POLICY_BYTES: u64 = 1 << 20, Bytes, "a policy",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// One line for each of [`FOLDER_FILES`].
    SUMS_BYTES: u64 = 32 << 20, Bytes, "`SHA256SUMS`",
        "files_past_their_limit_are_refused_before_they_are_read";
    /// What is written, and torn, at a time.
    JOURNAL_RECORD_BYTES: u64 = 1 << 20, Bytes, "a range of the journal of a change in place, or of an undo log",
        "a_journal_past_its_limits_is_refused";
    /// 256 GiB of full ones.
    JOURNAL_RECORDS: usize = 1 << 18, Count, "ranges of a journal",
        "a_journal_past_its_limits_is_refused";
    /// The receipt, and what vouches for the folder, in base64.
    JOURNAL_INDEX_BYTES: u64 = 64 << 20, Bytes, "the index of a journal",
        "a_journal_past_its_limits_is_refused";
    /// A PEM file of a key takes a few hundred bytes.
    KEY_BYTES: u64 = 64 << 10, Bytes, "a key",
        "files_past_their_limit_are_refused_before_they_are_read";
}

/// Bytes of memory that a byte of a file may become.
pub const AMPLIFICATION: u64 = 3;
/// Bytes of memory that a byte of an ONNX graph may become when it is decoded. With the byte in the map it makes four.
pub const GRAPH_AMPLIFICATION: u64 = 3;
/// What may come on top of [`AMPLIFICATION`]: small files are mostly names and structure.
pub const ALLOWANCE: u64 = 32 << 20;

/// Bytes of memory that a byte of a parquet file may become, beside [`TABLE_ALLOWANCE`]: rows may repeat a
/// picture that the file holds once.
pub const TABLE_AMPLIFICATION: u64 = 64;

/// The memory that `bytes` of structure may become.
pub fn allowed_memory(bytes: u64) -> u64 {
    bytes
        .saturating_mul(AMPLIFICATION)
        .saturating_add(ALLOWANCE)
}

/// The memory that a graph of `bytes` without its weights may become.
pub fn allowed_graph(bytes: u64) -> u64 {
    bytes
        .saturating_mul(GRAPH_AMPLIFICATION)
        .saturating_add(ALLOWANCE)
}
