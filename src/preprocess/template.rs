//! Chat templates: messages → text. In: a model folder's template. Out: what transformers'
//! `apply_chat_template` renders.
//!
//! A template is somebody else's program, so it runs without a loader, under fuel (which minijinja
//! also charges for memory: about 64 bytes a unit) and a recursion limit. The environment is
//! transformers' (`utils/chat_template_utils.py`): `trim_blocks`, `lstrip_blocks`, loop controls,
//! Python's string and dict methods, `tojson` as `json.dumps` writes it, `raise_exception`,
//! `strftime_now`, and the `{% generation %}` tag, which marks text and renders nothing.

#![warn(clippy::indexing_slicing)]

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde::Serialize;
use serde_json::json;

use super::{Error, ModelDir};
use crate::confine::{self, Budget, Fault};
use crate::files::read_text;
use crate::limits::{
    TEMPLATE_BYTES, TEMPLATE_DEPTH, TEMPLATE_FUEL, TEMPLATE_INDENT, TEMPLATE_MEMORY,
    TEMPLATE_SECONDS,
};

const NAME: &str = "chat_template";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    /// `bos_token` and the like, which transformers hands to the template.
    special_tokens: serde_json::Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// Finds and compiles the template of a model folder: `chat_template.jinja`, else
    /// `chat_template.json`, else `tokenizer_config.json`'s `chat_template` (a string, or a list of
    /// `{name, template}` with one named `default`).
    ///
    /// # Errors
    /// [`Error::TemplateMissing`], [`Error::TemplateSyntax`], and the errors of reading the files.
    pub fn open(model: &ModelDir) -> Result<Self, Error> {
        let tokenizer_config = model.optional_json("tokenizer_config.json")?;
        let special_tokens = tokenizer_config
            .as_ref()
            .map(special_tokens)
            .unwrap_or_default();

        let jinja = model.dir().join("chat_template.jinja");
        if jinja.exists() {
            let source = read_text(&jinja, TEMPLATE_BYTES)?;
            return Self::compile(&jinja, &source, special_tokens);
        }
        let json = model.optional_json("chat_template.json")?;
        for config in json.iter().chain(&tokenizer_config) {
            match config.get("chat_template") {
                None | Some(serde_json::Value::Null) => {}
                Some(serde_json::Value::String(source)) => {
                    return Self::compile(config.path(), source, special_tokens);
                }
                Some(templates) => {
                    let default = templates.as_array().and_then(|templates| {
                        templates.iter().find(|template| {
                            template.get("name").is_some_and(|name| name == "default")
                        })
                    });
                    let source = default
                        .and_then(|template| template.get("template")?.as_str())
                        .ok_or_else(|| {
                            config.field(
                                "chat_template",
                                "a string, or a list with a template named `default`",
                                "neither",
                            )
                        })?;
                    return Self::compile(config.path(), source, special_tokens);
                }
            }
        }
        Err(Error::TemplateMissing {
            dir: model.dir().to_path_buf(),
        })
    }

    fn compile(
        path: &Path,
        source: &str,
        special_tokens: serde_json::Map<String, serde_json::Value>,
    ) -> Result<Self, Error> {
        rehearsed(source).map_err(|fault| Error::TemplateRender {
            path: path.to_path_buf(),
            source: minijinja::Error::new(ErrorKind::InvalidOperation, fault.to_string()),
        })?;
        Self::compile_here(path, source, special_tokens)
    }

    fn compile_here(
        path: &Path,
        source: &str,
        special_tokens: serde_json::Map<String, serde_json::Value>,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|source| Error::TemplateSyntax {
            path: path.to_path_buf(),
            source,
        })?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.set_recursion_limit(TEMPLATE_DEPTH);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|source| Error::TemplateSyntax {
                path: path.to_path_buf(),
                source,
            })?;
        Ok(Self {
            path: path.to_path_buf(),
            environment,
            special_tokens,
        })
    }

    /// The file that holds the template.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renders a conversation. `messages` is transformers' list of `{"role", "content"}`.
    ///
    /// # Errors
    /// [`Error::TemplateRender`]: the template raised an exception, used what does not exist, or
    /// ran past its limits.
    pub fn render(
        &self,
        messages: &serde_json::Value,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), messages.clone());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        // transformers passes both, as None.
        context.insert("tools".into(), json!(null));
        context.insert("documents".into(), json!(null));
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(Value::from(Serde(&context))))
            .map_err(|source| Error::TemplateRender {
                path: self.path.clone(),
                source,
            })
    }
}

/// Renders a conversation in a child process first: fuel counts steps, and a list that is added to itself 60 times
/// takes few steps and 2⁶⁰ items.
fn rehearsed(source: &str) -> Result<(), Fault> {
    if !confine::is_enabled() {
        return Ok(());
    }
    let mut file = tempfile::tempfile()?;
    file.write_all(source.as_bytes())?;
    file.rewind()?;
    let budget = Budget {
        memory: TEMPLATE_MEMORY,
        seconds: TEMPLATE_SECONDS,
    };
    confine::read(TEMPLATE, rehearse, file, budget, &mut |_| Ok(()))
}

/// The name of [`rehearse`] among the confined readers.
pub(crate) const TEMPLATE: &str = "template";

/// The confined part: renders a conversation as those of a data set are. Whether the template can is found out later.
pub(crate) fn rehearse(mut file: File, _: confine::Sink<'_>) -> Result<(), String> {
    let mut source = String::new();
    file.read_to_string(&mut source)
        .map_err(|error| error.to_string())?;
    let template = ChatTemplate::compile_here(Path::new(NAME), &source, serde_json::Map::new());
    let Ok(template) = template else {
        return Ok(());
    };
    let parts = |question: serde_json::Value, answer: serde_json::Value| json!([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]);
    let (question, answer) = ("What is in the picture?", "A garden.");
    let text = |text: &str| json!({"type": "text", "text": text});
    for messages in [
        parts(
            json!([{"type": "image"}, text(question)]),
            json!([text(answer)]),
        ),
        parts(json!(question), json!(answer)),
    ] {
        for add_generation_prompt in [false, true] {
            let _ = template.render(&messages, add_generation_prompt);
        }
    }
    Ok(())
}

fn special_tokens(config: &super::config::Json) -> serde_json::Map<String, serde_json::Value> {
    [
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    ]
    .iter()
    .filter_map(|name| Some(((*name).to_owned(), config.token(name)?.into())))
    .collect()
}

/// `{% generation %}…{% endgeneration %}` only tells transformers which text the assistant wrote.
/// An `if` that always holds renders the same, down to the whitespace that the tag trims.
fn without_generation_tags(source: &str) -> String {
    #[expect(
        clippy::expect_used,
        reason = "the pattern is a constant, and a test compiles it"
    )]
    static TAG: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a valid pattern")
    });
    TAG.replace_all(source, |found: &regex::Captures<'_>| {
        let group = |index| found.get(index).map_or("", |group| group.as_str());
        let tag = if found.get(2).is_some() {
            "endif"
        } else {
            "if true"
        };
        format!("{{%{} {tag} {}%}}", group(1), group(3))
    })
    .into_owned()
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: a space after commas and colons, nothing
/// escaped for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let failed = |error: String| minijinja::Error::new(ErrorKind::InvalidOperation, error);
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;

    let mut bytes = Vec::new();
    match indent {
        Some(width) if width > TEMPLATE_INDENT => {
            return Err(failed(format!(
                "tojson: an indent of at most {TEMPLATE_INDENT}, not {width}"
            )));
        }
        Some(width) => {
            let spaces = vec![b' '; width];
            let format = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut bytes, format,
            ))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut bytes,
            PythonSeparators,
        )),
    }
    .map_err(|error| failed(error.to_string()))?;
    let mut text = String::from_utf8(bytes).map_err(|error| failed(error.to_string()))?;
    if ensure_ascii == Some(true) {
        let mut units = [0_u16; 2];
        text = text
            .chars()
            .map(|char| match char {
                ascii if ascii.is_ascii() => ascii.to_string(),
                other => other
                    .encode_utf16(&mut units)
                    .iter()
                    .map(|unit| format!("\\u{unit:04x}"))
                    .collect(),
            })
            .collect();
    }
    Ok(Value::from_safe_string(text))
}

/// Python's default separators, `", "` and `": "`.
struct PythonSeparators;

impl serde_json::ser::Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Today's date by a `strftime` format, in UTC (transformers: local time). A template that uses it
/// renders another prompt every day, here as there.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    strftime(format, seconds).ok_or_else(|| {
        minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: format `{format}`"),
        )
    })
}

/// `None` where the format uses a directive that is not known here.
fn strftime(format: &str, seconds_since_1970: u64) -> Option<String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];

    let (days, second) = (seconds_since_1970 / 86_400, seconds_since_1970 % 86_400);
    // Howard Hinnant's `civil_from_days`, for dates from 1970 on.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let month_name = MONTHS.get(usize::try_from(month - 1).ok()?)?;
    let day_name = DAYS.get(usize::try_from(days % 7).ok()?)?;

    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            text.push(char);
            continue;
        }
        text.push_str(&match chars.next()? {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'B' => (*month_name).to_owned(),
            'b' => month_name.get(..3)?.to_owned(),
            'A' => (*day_name).to_owned(),
            'a' => day_name.get(..3)?.to_owned(),
            'H' => format!("{:02}", second / 3600),
            'M' => format!("{:02}", second / 60 % 60),
            'S' => format!("{:02}", second % 60),
            '%' => "%".to_owned(),
            _ => return None,
        });
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(source: &str) -> Result<ChatTemplate, Error> {
        ChatTemplate::compile(
            Path::new("chat_template.jinja"),
            source,
            serde_json::Map::new(),
        )
    }

    fn render(source: &str) -> Result<String, Error> {
        let messages =
            json!([{"role": "user", "content": [{"type": "text", "text": " Näme <b> "}]}]);
        compile(source)?.render(&messages, true)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let source = "{% for m in messages %}\n    {% if loop.first %}\n{{ m.role }}\n{% endif %}\n{% endfor %}\nend\n";
        assert_eq!(render(source).unwrap(), "user\nend");
    }

    #[test]
    fn generation_tags_render_what_they_hold() {
        let source =
            "a\n{%- generation %}\n b {% endgeneration -%}\n c{% generation %}d{%endgeneration%}";
        assert_eq!(render(source).unwrap(), "a b cd");
    }

    #[test]
    fn python_methods_and_loop_controls_work() {
        let source = "{% set t = messages[0].content[0].text %}\
                      {{ t.strip() }}|{{ t.strip().split(' ')[1] }}|{{ t.startswith(' N') }}|\
                      {% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}\
                      {% endfor %}|{{ tools is none }}";
        assert_eq!(render(source).unwrap(), "Näme <b>|<b>|True|01|True");
    }

    #[test]
    fn tojson_writes_what_json_dumps_writes() {
        assert_eq!(
            render("{{ messages | tojson }}").unwrap(),
            r#"[{"role": "user", "content": [{"type": "text", "text": " Näme <b> "}]}]"#
        );
        assert_eq!(
            render("{{ {'a': [1, 2]} | tojson(indent=2) }}").unwrap(),
            "{\n  \"a\": [\n    1,\n    2\n  ]\n}"
        );
        assert_eq!(
            render("{{ 'ä😀' | tojson(ensure_ascii=true) }}").unwrap(),
            r#""\u00e4\ud83d\ude00""#
        );
        assert!(render("{{ [1] | tojson(indent=1000000000) }}").is_err());
    }

    #[test]
    fn a_template_can_refuse_and_its_words_are_kept() {
        let error = render("{{ raise_exception('no images here') }}").unwrap_err();
        assert_eq!(
            error.to_string(),
            "chat_template.jinja: the chat template failed"
        );
        assert!(
            std::error::Error::source(&error)
                .unwrap()
                .to_string()
                .contains("no images here")
        );
    }

    #[test]
    fn a_template_that_runs_forever_or_eats_memory_is_stopped() {
        for source in [
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 'x' * 4000000000 }}",
            "{{ 'x' | indent(4000000000) }}",
            "{% set n = namespace(v='xxxxxxxx') %}{% for i in range(60) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
        ] {
            let error = render(source).unwrap_err();
            assert!(
                matches!(error, Error::TemplateRender { .. }),
                "{source}: {error}"
            );
        }
    }

    #[test]
    fn a_template_reaches_no_other_file_and_bad_syntax_is_named() {
        assert!(render("{% include '/etc/passwd' %}").is_err());
        let error = compile("{% if %}").unwrap_err();
        assert_eq!(
            error.to_string(),
            "chat_template.jinja: the chat template does not parse"
        );
    }

    #[test]
    fn dates_are_written_as_strftime_does() {
        assert_eq!(
            strftime("%d %b %Y, %A %H:%M:%S %%", 951_827_696).unwrap(),
            "29 Feb 2000, Tuesday 12:34:56 %"
        );
        assert_eq!(strftime("%e %B %y", 0).unwrap(), " 1 January 70");
        assert_eq!(strftime("%Q", 0), None);
        assert_eq!(strftime("%", 0), None);
        assert!(
            render("{{ strftime_now('%Y-%m-%d') }}")
                .unwrap()
                .starts_with("20")
        );
    }
}
