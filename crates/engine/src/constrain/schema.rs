//! What an answer must be: any JSON object, or what a JSON Schema describes. Only the part of JSON
//! Schema that the automaton enforces is accepted; a keyword that would be ignored is refused by
//! its name, except for annotations.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::automaton::MAX_DEPTH;
use super::texts::{Text, Texts};

/// Where schemas keep what `$ref` names, at their root.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];
/// The place of a whole schema.
const ROOT: &str = "schema";
/// Most kinds of values in one schema.
const MAX_NODES: usize = 1024;
/// Most keys of one object: they are counted in the bits of a word.
const MAX_KEYS: usize = 64;
/// Most listed values of one `enum`.
const MAX_LITERALS: usize = 1024;
/// Longest name of a property or a definition, in bytes.
pub(super) const MAX_NAME: usize = 256;
/// Most bytes of what one schema becomes: names, listed values and kinds of values, each kind counted at
/// every place that refers to it. A grammar is kept for as long as its answer waits.
pub(super) const MAX_BYTES: usize = 256 << 10;
/// Most that an allocation takes beyond what was asked for.
pub(super) const ALLOCATION: usize = 24;
/// Keywords that say nothing about which values are valid.
const ANNOTATIONS: &[&str] = &[
    "$comment",
    "$id",
    "$schema",
    "default",
    "deprecated",
    "description",
    "examples",
    "readOnly",
    "title",
    "writeOnly",
];

/// What a JSON value may be. Cheap to clone.
#[derive(Clone)]
pub(super) struct Rules(Arc<Inner>);

struct Inner {
    nodes: Box<[Node]>,
    texts: Texts,
    root: u16,
}

/// One kind of value.
#[derive(Default)]
pub(super) struct Node {
    pub(super) kinds: Kinds,
    pub(super) object: Option<Object>,
    pub(super) array: Option<Array>,
    /// The value may be one of these, too: none of another kind begins as one of them does. Sorted.
    pub(super) literals: Vec<Text>,
}

/// Which scalars.
#[derive(Clone, Copy, Default)]
pub(super) struct Kinds {
    pub(super) string: bool,
    pub(super) number: bool,
    pub(super) integer: bool,
    pub(super) boolean: bool,
    pub(super) null: bool,
}

pub(super) struct Object {
    /// Any key, with values of this kind; there are no declared ones then.
    pub(super) open: Option<u16>,
    /// Sorted by their text.
    pub(super) keys: Vec<Key>,
    /// A bit for each key that must be there.
    pub(super) required: u64,
}

#[derive(Clone, Copy)]
pub(super) struct Key {
    /// As JSON writes it, without its quotes.
    pub(super) text: Text,
    pub(super) node: u16,
}

#[derive(Clone, Copy)]
pub(super) struct Array {
    pub(super) items: u16,
    pub(super) min: u64,
    pub(super) max: u64,
}

impl Node {
    /// A bit for each type of its values.
    fn types(&self, texts: &Texts) -> u8 {
        let kinds = self.kinds;
        let listed = |literal: &[u8]| match literal.first() {
            Some(b'"') => 0,
            Some(b't' | b'f') => 2,
            Some(b'n') => 3,
            Some(b'{') => 4,
            Some(b'[') => 5,
            _ => 1,
        };
        let kinds = [
            kinds.string,
            kinds.number || kinds.integer,
            kinds.boolean,
            kinds.null,
            self.object.is_some(),
            self.array.is_some(),
        ];
        let kinds = (0..).zip(kinds).map(|(bit, has)| u8::from(has) << bit);
        let listed = self
            .literals
            .iter()
            .map(|&literal| 1 << listed(texts.get(literal)));
        kinds.chain(listed).fold(0, |all, bit| all | bit)
    }

    /// What it takes beyond its own size.
    fn held(&self) -> usize {
        let keys = self
            .object
            .as_ref()
            .map_or(0, |object| object.keys.capacity());
        list_bytes::<Key>(keys) + list_bytes::<Text>(self.literals.capacity())
    }
}

/// What a list of so many takes.
fn list_bytes<T>(entries: usize) -> usize {
    match entries * size_of::<T>() {
        0 => 0,
        bytes => bytes + ALLOCATION,
    }
}

impl Object {
    /// A bit for each declared key.
    pub(super) fn all(&self) -> u64 {
        match self.keys.len() {
            0 => 0,
            n => u64::MAX >> (64 - n),
        }
    }
}

/// Why a schema cannot be enforced. It names a place in the schema, which is not secret, and nothing
/// of its texts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct SchemaError {
    /// Where, as in `schema.properties.name`.
    pub place: String,
    /// What is wrong, and what to do.
    pub reason: String,
}

impl Rules {
    /// Any JSON object.
    pub(super) fn json_object() -> Self {
        let mut compiler = Compiler::default();
        let any = compiler.any();
        let root = compiler.object_of(any);
        compiler.finish(root)
    }

    /// What a schema describes; at its root, an object.
    pub(super) fn from_schema(schema: &Value) -> Result<Self, SchemaError> {
        let mut compiler = Compiler::of(schema)?;
        let node = compiler.describe(schema, ROOT, 0)?;
        let scalar = node.kinds.string
            || node.kinds.number
            || node.kinds.integer
            || node.kinds.boolean
            || node.kinds.null;
        if node.object.is_none() || node.array.is_some() || scalar {
            return Err(wrong(ROOT, "its root must be of type \"object\" alone"));
        }
        let root = compiler.add(node);
        Ok(compiler.finish(root))
    }

    pub(super) fn nodes(&self) -> usize {
        self.0.nodes.len()
    }

    pub(super) fn root(&self) -> u16 {
        self.0.root
    }

    pub(super) fn node(&self, node: u16) -> &Node {
        &self.0.nodes[usize::from(node)]
    }

    pub(super) fn text(&self, text: Text) -> &[u8] {
        self.0.texts.get(text)
    }

    /// Every key and every listed value, with a zero byte behind each.
    pub(super) fn all_texts(&self) -> &[u8] {
        self.0.texts.all()
    }

    /// The memory that it takes, with what allocations add.
    pub(super) fn bytes(&self) -> usize {
        let nodes = list_bytes::<Node>(self.0.nodes.len());
        let lists: usize = self.0.nodes.iter().map(Node::held).sum();
        OWN_BYTES + nodes + lists + self.0.texts.bytes()
    }
}

/// Of every grammar: itself, the counts of who holds it, three allocations.
const OWN_BYTES: usize = size_of::<Inner>() + 2 * size_of::<usize>() + 3 * ALLOCATION;

pub(super) fn wrong(place: &str, reason: impl Into<String>) -> SchemaError {
    // A place is made of a client's own keys; it is cut because it came from outside.
    SchemaError {
        place: place.chars().take(200).collect(),
        reason: reason.into(),
    }
}

#[derive(Default)]
struct Compiler<'a> {
    nodes: Vec<Node>,
    texts: Texts,
    /// Where the texts of keys are: each is there once.
    names: BTreeMap<&'a str, Text>,
    any: Option<u16>,
    /// Schemas so far, with those that became a part of another.
    schemas: usize,
    /// What it counts towards [`MAX_BYTES`] so far.
    bytes: usize,
    /// What `$ref` can name.
    definitions: BTreeMap<String, &'a Value>,
    /// The definitions that the place at hand is inside of.
    inside: Vec<&'a str>,
}

impl<'a> Compiler<'a> {
    /// With the definitions at the root of a schema.
    fn of(schema: &'a Value) -> Result<Self, SchemaError> {
        let mut definitions = BTreeMap::new();
        for section in DEFINITIONS {
            let Some(found) = schema.get(section) else {
                continue;
            };
            let found = found
                .as_object()
                .ok_or_else(|| wrong(ROOT, format!("'{section}' must be an object")))?;
            for (name, definition) in found {
                short(name, ROOT)?;
                // In a pointer, these two are escaped.
                let name = name.replace('~', "~0").replace('/', "~1");
                definitions.insert(format!("#/{section}/{name}"), definition);
            }
        }
        Ok(Self {
            definitions,
            bytes: OWN_BYTES + size_of::<Node>() + ALLOCATION,
            ..Self::default()
        })
    }

    fn finish(self, root: u16) -> Rules {
        Rules(Arc::new(Inner {
            nodes: self.nodes.into_boxed_slice(),
            texts: self.texts.shrunk(),
            root,
        }))
    }

    /// Counts what is about to be kept.
    fn count(&mut self, bytes: usize, place: &str) -> Result<(), SchemaError> {
        self.bytes += bytes;
        if self.bytes <= MAX_BYTES {
            return Ok(());
        }
        let reason = format!(
            "more than {MAX_BYTES} bytes of names, listed values and schemas in it, each schema at every place \
             that refers to it"
        );
        Err(wrong(place, reason))
    }

    fn add(&mut self, node: Node) -> u16 {
        self.nodes.push(node);
        // `describe` refuses more than MAX_NODES.
        (self.nodes.len() - 1) as u16
    }

    /// Any value.
    fn any(&mut self) -> u16 {
        if let Some(any) = self.any {
            return any;
        }
        let node = self.add(Node::default());
        self.nodes[usize::from(node)] = Node {
            kinds: Kinds {
                string: true,
                number: true,
                integer: true,
                boolean: true,
                null: true,
            },
            object: Some(open(node)),
            array: Some(Array {
                items: node,
                min: 0,
                max: u64::MAX,
            }),
            literals: Vec::new(),
        };
        self.any = Some(node);
        node
    }

    fn object_of(&mut self, node: u16) -> u16 {
        self.add(Node {
            object: Some(open(node)),
            ..Node::default()
        })
    }

    fn compile(
        &mut self,
        schema: &'a Value,
        place: &str,
        depth: usize,
    ) -> Result<u16, SchemaError> {
        let node = self.describe(schema, place, depth)?;
        Ok(self.add(node))
    }

    fn describe(
        &mut self,
        schema: &'a Value,
        place: &str,
        depth: usize,
    ) -> Result<Node, SchemaError> {
        if depth == MAX_DEPTH {
            return Err(wrong(place, format!("nested deeper than {MAX_DEPTH}")));
        }
        let schema = schema
            .as_object()
            .ok_or_else(|| wrong(place, "must be an object"))?;
        if let Some(target) = schema.get("$ref") {
            only(schema, place, &["$ref"])?;
            return self.definition(target, place, depth);
        }
        if self.schemas == MAX_NODES {
            return Err(wrong(place, format!("more than {MAX_NODES} schemas in it")));
        }
        self.schemas += 1;
        self.count(size_of::<Node>(), place)?;
        if let Some(list) = schema.get("anyOf") {
            only(schema, place, &["anyOf"])?;
            return self.any_of(list, place, depth);
        }
        if schema.contains_key("enum") || schema.contains_key("const") {
            only(schema, place, &["enum", "const", "type"])?;
            let literals = self.literals(schema, place)?;
            return Ok(Node {
                literals,
                ..Node::default()
            });
        }
        let mut node = Node::default();
        let mut allowed = vec!["type"];
        for name in type_names(schema, place)? {
            match name {
                "string" => node.kinds.string = true,
                "number" => node.kinds.number = true,
                "integer" => node.kinds.integer = true,
                "boolean" => node.kinds.boolean = true,
                "null" => node.kinds.null = true,
                "object" => {
                    allowed.extend(["properties", "required", "additionalProperties"]);
                    node.object = Some(self.object(schema, place, depth)?);
                }
                "array" => {
                    allowed.extend(["items", "minItems", "maxItems"]);
                    node.array = Some(self.array(schema, place, depth)?);
                }
                _ => return Err(wrong(place, "has a 'type' that JSON Schema does not know")),
            }
        }
        only(schema, place, &allowed)?;
        Ok(node)
    }

    /// What a `$ref` names, compiled anew for this place: so the bounds of depth and size hold for
    /// what it stands for.
    fn definition(
        &mut self,
        target: &'a Value,
        place: &str,
        depth: usize,
    ) -> Result<Node, SchemaError> {
        let target = target.as_str().unwrap_or_default();
        let Some(definition) = self.definitions.get(target).copied() else {
            let reason = "'$ref' must name what '$defs' at the root of the schema has, as in \"#/$defs/name\"";
            return Err(wrong(place, reason));
        };
        if self.inside.contains(&target) {
            return Err(wrong(place, "'$ref' names what it is a part of"));
        }
        self.inside.push(target);
        let node = self.describe(definition, place, depth + 1);
        self.inside.pop();
        node
    }

    fn object(
        &mut self,
        schema: &'a Map<String, Value>,
        place: &str,
        depth: usize,
    ) -> Result<Object, SchemaError> {
        let Some(properties) = schema.get("properties") else {
            if schema.contains_key("required") {
                return Err(wrong(place, "has 'required' without 'properties'"));
            }
            if schema.get("additionalProperties") == Some(&Value::Bool(false)) {
                return Ok(Object {
                    open: None,
                    keys: Vec::new(),
                    required: 0,
                });
            }
            return Ok(match schema.get("additionalProperties") {
                None | Some(Value::Bool(_)) => open(self.any()),
                Some(values) => {
                    let inner = format!("{place}.additionalProperties");
                    open(self.compile(values, &inner, depth + 1)?)
                }
            });
        };
        let properties = properties
            .as_object()
            .ok_or_else(|| wrong(place, "'properties' must be an object"))?;
        if schema.get("additionalProperties") != Some(&Value::Bool(false)) {
            return Err(wrong(
                place,
                "needs \"additionalProperties\": false beside 'properties'",
            ));
        }
        if properties.len() > MAX_KEYS {
            return Err(wrong(place, format!("has more than {MAX_KEYS} properties")));
        }
        self.count(list_bytes::<Key>(properties.len()), place)?;
        let mut sorted = Vec::with_capacity(properties.len());
        for (name, value) in properties {
            short(name, place)?;
            let node = self.compile(value, &format!("{place}.properties.{name}"), depth + 1)?;
            let text = self.key(name, place)?;
            sorted.push((name, Key { text, node }));
        }
        sorted.sort_unstable_by_key(|(_, key)| self.texts.get(key.text));
        let mut required = 0;
        let names = strings(schema, "required", place)?;
        if names.len() > properties.len() {
            return Err(wrong(place, "'required' is longer than 'properties'"));
        }
        for name in names {
            let at = sorted
                .iter()
                .position(|(property, _)| *property == name)
                .ok_or_else(|| wrong(place, "'required' names what 'properties' does not have"))?;
            required |= 1 << at;
        }
        let mut keys = Vec::with_capacity(sorted.len());
        keys.extend(sorted.into_iter().map(|(_, key)| key));
        Ok(Object {
            open: None,
            keys,
            required,
        })
    }

    /// The text of a key.
    fn key(&mut self, name: &'a str, place: &str) -> Result<Text, SchemaError> {
        if let Some(&text) = self.names.get(name) {
            return Ok(text);
        }
        let text = self.keep(&quoted(name), place)?;
        self.names.insert(name, text);
        Ok(text)
    }

    fn keep(&mut self, text: &[u8], place: &str) -> Result<Text, SchemaError> {
        let cost = text.len() + 1;
        self.count(cost, place)?;
        let long = || {
            let most = u16::MAX;
            wrong(place, format!("lists a value of more than {most} bytes"))
        };
        self.texts.push(text).ok_or_else(long)
    }

    fn array(
        &mut self,
        schema: &'a Map<String, Value>,
        place: &str,
        depth: usize,
    ) -> Result<Array, SchemaError> {
        let items = match schema.get("items") {
            None => self.any(),
            Some(items) => self.compile(items, &format!("{place}.items"), depth + 1)?,
        };
        let count = |name: &str, default| match schema.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .ok_or_else(|| wrong(place, format!("'{name}' must be a whole number"))),
        };
        let (min, max) = (count("minItems", 0)?, count("maxItems", u64::MAX)?);
        if min > max {
            return Err(wrong(place, "'minItems' is more than 'maxItems'"));
        }
        Ok(Array { items, min, max })
    }

    /// Alternatives that differ in the type of the value, so that its first byte says which.
    fn any_of(&mut self, list: &'a Value, place: &str, depth: usize) -> Result<Node, SchemaError> {
        let list = list
            .as_array()
            .filter(|list| !list.is_empty())
            .ok_or_else(|| wrong(place, "'anyOf' must be a list of schemas"))?;
        let mut all = Node::default();
        for (index, schema) in list.iter().enumerate() {
            let node = self.describe(schema, &format!("{place}.anyOf[{index}]"), depth + 1)?;
            if all.types(&self.texts) & node.types(&self.texts) != 0 {
                let reason = "the alternatives of 'anyOf' must differ in their types";
                return Err(wrong(place, reason));
            }
            let (a, b) = (all.kinds, node.kinds);
            all.kinds = Kinds {
                string: a.string || b.string,
                number: a.number || b.number,
                integer: a.integer || b.integer,
                boolean: a.boolean || b.boolean,
                null: a.null || b.null,
            };
            all.object = all.object.or(node.object);
            all.array = all.array.or(node.array);
            all.literals.extend(node.literals);
        }
        self.sort(&mut all.literals);
        Ok(all)
    }

    fn literals(
        &mut self,
        schema: &Map<String, Value>,
        place: &str,
    ) -> Result<Vec<Text>, SchemaError> {
        let values = match (schema.get("enum"), schema.get("const")) {
            (Some(Value::Array(list)), None) if !list.is_empty() => list.as_slice(),
            (None, Some(value)) => std::slice::from_ref(value),
            _ => {
                return Err(wrong(
                    place,
                    "needs either 'const' or a list of values in 'enum'",
                ));
            }
        };
        let types: Vec<&str> = match schema.get("type") {
            None => Vec::new(),
            Some(_) => type_names(schema, place)?,
        };
        if values.len() > MAX_LITERALS {
            return Err(wrong(
                place,
                format!("lists more than {MAX_LITERALS} values"),
            ));
        }
        self.count(list_bytes::<Text>(values.len()), place)?;
        let mut literals = Vec::with_capacity(values.len());
        for value in values {
            if !types.is_empty() && !types.iter().any(|name| is_of(value, name)) {
                return Err(wrong(place, "lists a value that is not of its 'type'"));
            }
            literals.push(self.keep(value.to_string().as_bytes(), place)?);
        }
        self.sort(&mut literals);
        Ok(literals)
    }

    /// Each listed value once, and no memory beyond them.
    fn sort(&self, literals: &mut Vec<Text>) {
        literals.sort_unstable_by_key(|&literal| self.texts.get(literal));
        literals.dedup_by_key(|literal| self.texts.get(*literal));
        literals.shrink_to_fit();
    }
}

fn open(node: u16) -> Object {
    Object {
        open: Some(node),
        keys: Vec::new(),
        required: 0,
    }
}

/// Refuses a long name.
fn short(name: &str, place: &str) -> Result<(), SchemaError> {
    if name.len() <= MAX_NAME {
        return Ok(());
    }
    Err(wrong(
        place,
        format!("has a name of more than {MAX_NAME} bytes"),
    ))
}

/// Refuses what is neither in `allowed` nor an annotation.
fn only(schema: &Map<String, Value>, place: &str, allowed: &[&str]) -> Result<(), SchemaError> {
    let known = |name: &str| {
        let root = place == ROOT && DEFINITIONS.contains(&name);
        root || allowed.contains(&name) || ANNOTATIONS.contains(&name)
    };
    match schema.keys().find(|name| !known(name)) {
        None => Ok(()),
        Some(name) => {
            let name: String = name.chars().take(64).collect();
            let reason = format!("the keyword '{name}' is not supported here");
            Err(wrong(place, reason))
        }
    }
}

fn type_names<'a>(
    schema: &'a Map<String, Value>,
    place: &str,
) -> Result<Vec<&'a str>, SchemaError> {
    let missing = || wrong(place, "needs a 'type'");
    match schema.get("type") {
        Some(Value::String(name)) => Ok(vec![name]),
        // There are seven.
        Some(Value::Array(names)) if (1..=7).contains(&names.len()) => {
            let names = names.iter().map(|name| name.as_str().ok_or_else(missing));
            names.collect()
        }
        _ => Err(missing()),
    }
}

fn strings<'a>(
    schema: &'a Map<String, Value>,
    name: &str,
    place: &str,
) -> Result<Vec<&'a str>, SchemaError> {
    let wrong = || wrong(place, format!("'{name}' must be a list of strings"));
    match schema.get(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list
            .iter()
            .map(|item| item.as_str().ok_or_else(wrong))
            .collect(),
        Some(_) => Err(wrong()),
    }
}

fn is_of(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        _ => false,
    }
}

/// A key as JSON writes it, without its quotes.
pub(super) fn quoted(name: &str) -> Box<[u8]> {
    let text = Value::from(name).to_string();
    text.as_bytes()[1..text.len() - 1].into()
}
