//! Which modules `adapter_config.json` says an adapter changes, held against those that it has tensors for.
//!
//! What is computed follows from the tensors alone, whose names are complete. The settings say the same a second time:
//! where they say something else, one of the two files belongs to another adapter, or is damaged.
//!
//! PEFT changes a module `model.layers.3.self_attn.q_proj` if `target_modules` lists that name or an end of it behind a dot,
//! in every block that has one; if it is a regular expression that fits the whole name; or if it is `all-linear`. Names that
//! fit no module are passed over as long as one fits. `exclude_modules`, in the same forms, comes first.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde_json::Value;

use super::adapter::{SETTINGS, wrong_type};
use crate::error::{Fault, Problem, Unsupported};

/// Modules of a block that an adapter can change.
const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];
/// What else PEFT makes factors for.
const OUTSIDE: [&str; 2] = ["lm_head", "model.embed_tokens"];
const ALL_LINEAR: &str = "all-linear";

/// A module of one block, as an index into [`MODULES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Module {
    kind: usize,
    block: u32,
}

impl Module {
    /// Reads `model.layers.3.self_attn.q_proj`.
    pub(super) fn parse(name: &str) -> Option<Module> {
        let (block, within) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let kind = MODULES.iter().position(|module| *module == within)?;
        let number: u32 = block.parse().ok()?;
        // The number's only spelling, so that two names cannot become one.
        let block = (number.to_string() == block).then_some(number)?;
        Some(Module { kind, block })
    }

    fn name(self) -> String {
        format!("model.layers.{}.{}", self.block, MODULES[self.kind])
    }
}

/// A name and its ends behind dots: whatever an entry of a list can say to mean it.
fn ends(name: &str) -> impl Iterator<Item = &str> {
    let behind_dots = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
    std::iter::once(name).chain(behind_dots)
}

/// One of the two settings.
#[derive(Debug)]
enum Names {
    /// Absent, or empty.
    None,
    /// Names of modules, or ends of them.
    Listed(HashSet<String>),
    /// A regular expression, which is not evaluated here.
    Pattern(String),
}

impl Names {
    fn read(key: &str, value: Option<&Value>) -> Result<Names, Problem> {
        match value {
            None | Some(Value::Null) => Ok(Names::None),
            Some(Value::String(pattern)) => Ok(Names::Pattern(pattern.clone())),
            Some(value) => serde_json::from_value(value.clone())
                .map(Names::Listed)
                .map_err(|_| wrong_type(key, "a list of names")),
        }
    }

    fn lists(&self, name: &str) -> bool {
        match self {
            Names::Listed(entries) => ends(name).any(|end| entries.contains(end)),
            Names::None | Names::Pattern(_) => false,
        }
    }
}

/// `target_modules` and `exclude_modules`.
#[derive(Debug)]
pub(super) struct Modules {
    targets: Names,
    excluded: Names,
}

impl Modules {
    pub(super) fn read(
        targets: Option<&Value>,
        excluded: Option<&Value>,
    ) -> Result<Modules, Problem> {
        let excluded = match Names::read("exclude_modules", excluded)? {
            Names::Listed(entries) if entries.is_empty() => Names::None,
            Names::Pattern(pattern) if pattern.is_empty() => Names::None,
            names => names,
        };
        Ok(Modules {
            targets: Names::read("target_modules", targets)?,
            excluded,
        })
    }

    /// Holds the settings against the modules that have tensors, in a base of so many blocks if that is known: each of them
    /// is meant, and none that is meant lacks. A regular expression is believed where the same modules have tensors in every
    /// block.
    pub(super) fn check(
        &self,
        found: &BTreeSet<Module>,
        blocks: Option<u32>,
    ) -> Result<(), Problem> {
        let last = found.iter().map(|module| module.block).max();
        // One more than the number of a block, which is one of a file that was read.
        let blocks = blocks.unwrap_or_else(|| last.map_or(0, |last| last.saturating_add(1)));
        if let Some(module) = found.iter().find(|m| self.excluded.lists(&m.name())) {
            return Err(stray(*module, "lists it under exclude_modules"));
        }
        let mut of_kind: BTreeMap<usize, BTreeSet<u32>> = BTreeMap::new();
        for module in found {
            of_kind.entry(module.kind).or_default().insert(module.block);
        }
        let none = BTreeSet::new();
        let gap = |kind: usize| self.gap(kind, of_kind.get(&kind).unwrap_or(&none), blocks);
        match &self.targets {
            // Of an adapter that was never given any: PEFT takes those that it has for this kind of model.
            Names::None => Ok(()),
            Names::Pattern(pattern) if pattern.eq_ignore_ascii_case(ALL_LINEAR) => {
                match (0..MODULES.len()).find_map(gap) {
                    None => Ok(()),
                    Some(module) => Err(self.missing(&module.name(), format!("has {ALL_LINEAR}"))),
                }
            }
            Names::Pattern(pattern) => match of_kind.keys().copied().find_map(gap) {
                None => Ok(()),
                Some(_) => Err(not_evaluated("target_modules", pattern)),
            },
            Names::Listed(entries) => {
                if let Some(module) = found.iter().find(|m| !self.targets.lists(&m.name())) {
                    return Err(stray(*module, "does not list it under target_modules"));
                }
                for (kind, module) in MODULES.iter().enumerate() {
                    let Some(entry) = ends(module).find(|end| entries.contains(*end)) else {
                        continue;
                    };
                    if let Some(module) = gap(kind) {
                        return Err(self.missing(&module.name(), format!("lists {entry}")));
                    }
                }
                self.check_single(entries, found)
            }
        }
    }

    /// The first block whose module of this kind has no tensors, though nothing excludes it.
    fn gap(&self, kind: usize, found: &BTreeSet<u32>, blocks: u32) -> Option<Module> {
        if self.excluded.lists(MODULES[kind]) {
            return None;
        }
        // What is excluded here is excluded by its number, so this ends soon where not much was found.
        let mut blocks = (0..blocks).map(|block| Module { kind, block });
        blocks.find(|m| !found.contains(&m.block) && !self.excluded.lists(&m.name()))
    }

    /// Each entry that names the module of one block, or one outside of the blocks, has its tensors.
    fn check_single(
        &self,
        entries: &HashSet<String>,
        found: &BTreeSet<Module>,
    ) -> Result<(), Problem> {
        let names: Vec<String> = found.iter().map(|module| module.name()).collect();
        let known: HashSet<&str> = names.iter().flat_map(|name| ends(name)).collect();
        // In their order, so that the same files always meet the same refusal.
        let entries: BTreeSet<&String> = entries.iter().collect();
        for entry in entries {
            if known.contains(&**entry) {
                continue;
            }
            if is_of_one_block(entry) && !self.excluded.lists(entry) {
                return Err(self.missing(entry, format!("lists {entry}")));
            }
            // A name that is nobody's in a model of this kind is passed over, as PEFT does.
            let outside = OUTSIDE
                .iter()
                .find(|name| ends(name).any(|end| end == entry));
            if let Some(name) = outside.filter(|name| !self.excluded.lists(name)) {
                return Err(self.missing(name, format!("lists {entry}")));
            }
        }
        Ok(())
    }

    /// Tensors that the settings ask for are not there. An expression in `exclude_modules` may be the reason.
    fn missing(&self, module: &str, says: String) -> Problem {
        if let Names::Pattern(pattern) = &self.excluded {
            return not_evaluated("exclude_modules", pattern);
        }
        let first = format!("{SETTINGS} {says} under target_modules");
        let second = format!("there are no tensors for {module}");
        Fault::Contradiction { first, second }.into()
    }
}

/// Whether an entry of a list can mean the module of one block only: it has a number before the module's name.
fn is_of_one_block(entry: &str) -> bool {
    MODULES.iter().any(|module| {
        let before = entry
            .strip_suffix(module)
            .and_then(|rest| rest.strip_suffix('.'));
        let number = before.and_then(|before| before.rsplit('.').next());
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

fn stray(module: Module, says: &str) -> Problem {
    let first = format!("there are tensors for {}", module.name());
    let second = format!("{SETTINGS} {says}");
    Fault::Contradiction { first, second }.into()
}

fn not_evaluated(key: &str, pattern: &str) -> Problem {
    Unsupported::ModulePattern {
        key: key.to_owned(),
        pattern: pattern.chars().take(200).collect(),
    }
    .into()
}
