//! What a service lets its users learn about the distribution behind its answers. The policy is
//! part of the measured configuration, so a user can know it, and an operator cannot widen it.

use serde::Deserialize;
use serde::de::Error as _;

use super::error::ApiError;

/// Most biased tokens of one request, as OpenAI's API allows.
const MAX_BIASES: usize = 300;
/// Most alternatives that a policy may show.
const MAX_TOP: u8 = 5;
/// Range of `rounding` and of `perturbation`, in nats: what is finer than the least would be none at all.
const NATS: std::ops::RangeInclusive<f64> = 0.001..=10.0;

/// `[extraction]` of the configuration. The default shows nothing and steers nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extraction {
    /// `"none"`, or the table `{ top = 3, rounding = 0.1, perturbation = 0.5 }`.
    #[serde(default)]
    pub logprobs: Logprobs,
    /// Whether users may bias tokens.
    #[serde(default)]
    pub logit_bias: bool,
}

/// How much of the log-probabilities is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Logprobs {
    /// Nothing.
    #[default]
    None,
    /// Rounded values of the likeliest tokens; of the chosen one, where it is among them.
    Rounded {
        /// Most alternatives, 0 to 5.
        top: u8,
        /// Values are multiples of this, in nats.
        rounding: f64,
        /// Before that, each is moved by up to this many nats, the same each time; absent: not at all.
        perturbation: Option<f64>,
    },
}

impl<'de> Deserialize<'de> for Logprobs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "`logprobs` is \"none\" or a table such as { top = 3, rounding = 0.1 }"
        )]
        enum Written {
            Word(String),
            Table(Table),
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            top: u8,
            rounding: f64,
            perturbation: Option<f64>,
        }
        match Written::deserialize(deserializer)? {
            Written::Word(word) if word == "none" => Ok(Self::None),
            Written::Word(_) => Err(D::Error::custom("the only word for `logprobs` is \"none\"")),
            Written::Table(Table { top, .. }) if top > MAX_TOP => Err(D::Error::custom(format!(
                "`top` of `logprobs` is from 0 to {MAX_TOP}"
            ))),
            Written::Table(Table { rounding, .. }) if !NATS.contains(&rounding) => {
                Err(D::Error::custom(outside("rounding")))
            }
            Written::Table(Table { perturbation, .. })
                if perturbation.is_some_and(|nats| !NATS.contains(&nats)) =>
            {
                Err(D::Error::custom(outside("perturbation")))
            }
            Written::Table(table) => Ok(Self::Rounded {
                top: table.top,
                rounding: table.rounding,
                perturbation: table.perturbation,
            }),
        }
    }
}

fn outside(name: &str) -> String {
    format!(
        "`{name}` of `logprobs` is from {} to {} nats",
        NATS.start(),
        NATS.end()
    )
}

/// Log-probabilities that a request may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shown {
    /// Alternatives at each position.
    pub(super) top: usize,
    /// How many of the likeliest the policy lets anybody see, at least one: a chosen token that is none of them has
    /// no value, because whoever steers the choice could read any token's.
    pub(super) known: usize,
    /// How far noise may move a value.
    pub(super) perturbation: Option<f64>,
    rounding: f64,
}

/// In place of a value that is not shown, as in OpenAI's API.
pub(super) const NOT_SHOWN: f64 = -9999.0;

impl Shown {
    /// A value as the policy shows it, with its noise. It stays a logarithm of a probability.
    pub(super) fn round(&self, logprob: f32, noise: f64) -> f64 {
        // The nearest multiple, then the nearest decimal, so that 0.1 · 3 is not 0.30000000000000004.
        let moved = (f64::from(logprob) + noise).min(0.0);
        let rounded = (moved / self.rounding).round() * self.rounding;
        (rounded * 1e6).round() / 1e6 + 0.0
    }
}

impl Extraction {
    /// Allows `top` alternatives at each position, or refuses; `param` is the field that asks.
    pub(super) fn logprobs(&self, param: &str, top: u64) -> Result<Shown, ApiError> {
        match self.logprobs {
            Logprobs::None => Err(ApiError::policy(
                param,
                "it shows no log-probabilities, because they help to extract the model",
            )),
            Logprobs::Rounded { top: most, .. } if top > most.into() => Err(ApiError::policy(
                param,
                &format!(
                    "it shows at most {most} of the likeliest tokens, and {top} were asked for"
                ),
            )),
            Logprobs::Rounded {
                top: most,
                rounding,
                perturbation,
            } => Ok(Shown {
                top: top as usize,
                known: usize::from(most).max(1),
                perturbation,
                rounding,
            }),
        }
    }

    /// Refuses a constraint that the client writes beside log-probabilities: it forces tokens as a bias does.
    pub(super) fn unsteered(&self, param: &str, steered: bool) -> Result<(), ApiError> {
        match steered {
            true => Err(ApiError::policy(
                param,
                "it never combines schemas or forced calls with 'logprobs'; json_object may be combined",
            )),
            false => Ok(()),
        }
    }

    /// Allows a map from token ids to biases, or refuses.
    pub(super) fn biases(
        &self,
        map: &serde_json::Map<String, serde_json::Value>,
        beside_logprobs: bool,
        vocab: u32,
    ) -> Result<Vec<(u32, f32)>, ApiError> {
        if map.is_empty() {
            return Ok(Vec::new());
        }
        if !self.logit_bias {
            return Err(ApiError::policy(
                "logit_bias",
                "it lets nobody bias tokens, because biases help to extract the model",
            ));
        }
        if beside_logprobs {
            return Err(ApiError::policy(
                "logit_bias",
                "it never combines biases with 'logprobs'",
            ));
        }
        if map.len() > MAX_BIASES {
            let most = format!("at most {MAX_BIASES} tokens");
            return Err(ApiError::value("logit_bias", most));
        }
        let wrong = || {
            let rule =
                format!("maps token ids below {vocab}, in decimal, to numbers from -100 to 100");
            ApiError::value("logit_bias", rule)
        };
        let parse = |(id, bias): (&String, &serde_json::Value)| {
            let number: u32 = id.parse().map_err(|_| wrong())?;
            // One spelling for each token, so that none is given twice.
            if number.to_string() != *id || number >= vocab {
                return Err(wrong());
            }
            let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b));
            Ok((number, bias.ok_or_else(wrong)? as f32))
        };
        map.iter().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Extraction, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn the_default_shows_nothing() {
        let nothing = Extraction {
            logprobs: Logprobs::None,
            logit_bias: false,
        };
        assert_eq!(parse(""), Ok(nothing));
        assert_eq!(parse("logprobs = \"none\""), Ok(nothing));
        assert!(nothing.logprobs("logprobs", 0).is_err());
    }

    #[test]
    fn bounds_are_part_of_the_format() {
        let rounded = |top, rounding, perturbation| Logprobs::Rounded {
            top,
            rounding,
            perturbation,
        };
        let some = parse("logprobs = { top = 5, rounding = 0.001 }\nlogit_bias = true").unwrap();
        assert_eq!(
            (some.logprobs, some.logit_bias),
            (rounded(5, 0.001, None), true)
        );
        let noisy = parse("logprobs = { top = 1, rounding = 0.1, perturbation = 0.5 }").unwrap();
        assert_eq!(noisy.logprobs, rounded(1, 0.1, Some(0.5)));
        for (bad, told) in [
            ("logprobs = { top = 6, rounding = 0.1 }", "0 to 5"),
            ("logprobs = { top = 1, rounding = 0.0 }", "0.001"),
            ("logprobs = { top = 1, rounding = nan }", "0.001"),
            (
                "logprobs = { top = 1, rounding = 0.1, perturbation = 0.0 }",
                "`perturbation`",
            ),
            (
                "logprobs = { top = 1, rounding = 0.1, perturbation = nan }",
                "`perturbation`",
            ),
            ("logprobs = { top = 1, perturbation = 0.5 }", "such as"),
            ("logprobs = { top = 1 }", "such as"),
            ("logprobs = { top = 1, rounding = 0.1, x = 1 }", "such as"),
            ("logprobs = \"all\"", "none"),
            ("logprobs = true", "such as"),
            ("logit_biases = true", "logit_biases"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn values_are_multiples_of_the_rounding() {
        let shown = |rounding| Shown {
            top: 0,
            known: 1,
            perturbation: None,
            rounding,
        };
        assert_eq!(shown(0.1).round(-0.31, 0.0), -0.3);
        assert_eq!(shown(0.1).round(-0.04, 0.0).to_string(), "0");
        assert_eq!(shown(0.25).round(-12.4, 0.0), -12.5);
        assert_eq!(shown(10.0).round(-4.9, 0.0), 0.0);
        assert_eq!(shown(0.1).round(-0.31, -0.2), -0.5);
        assert_eq!(shown(0.1).round(-0.31, 0.5), 0.0, "no value above zero");
    }
}
