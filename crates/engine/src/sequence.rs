//! A request while it is computed: the state between its tokens, and the sequences that it has in
//! the KV cache. Which requests run together is the scheduler's business.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::time::Duration;

use casemate_kernels::attention::PAGE;

use crate::adapters::{AdapterIndex, Adapters};
use crate::beam::{self, BeamSearch, Beams, MAXIMUM_BEAMS};
use crate::constrain::{Constraint, Grammar};
use crate::error::{RequestError, SubmitError};
use crate::kv::{KvCache, Slot};
use crate::logprobs::{MAXIMUM_TOP, TokenLogprobs};
use crate::request::{
    Event, FinishReason, MAXIMUM_STOP_BYTES, MAXIMUM_STOPS, Request, RequestId, Sink, User,
};
use crate::sampler::{Sampler, Scratch};
use crate::scheduler::AccountId;
use crate::speculation::Lookup;
use crate::stop::StopMatcher;
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// Bytes that hold the text of nearly every token.
const USUAL_PIECE: usize = 256;

/// Limits a request is checked against.
pub(crate) struct Limits<'a> {
    pub(crate) context: usize,
    pub(crate) vocab: u32,
    pub(crate) end_tokens: &'a [u32],
    pub(crate) adapters: &'a Adapters,
    /// Sequences computed together.
    pub(crate) batch: usize,
    /// Pages of the KV cache, and bytes of each.
    pub(crate) pages: usize,
    pub(crate) page_bytes: u64,
    /// Whether tokens are chosen by touching everything.
    pub(crate) oblivious: bool,
}

/// One of the sequences that a request has in the KV cache: its beams, otherwise one.
#[derive(Clone, Copy)]
struct Lane {
    slot: Slot,
    /// How many positions the KV cache holds.
    fed: usize,
}

/// Tokens that a request can be fed next.
pub(crate) struct Chunk<'a> {
    pub(crate) lane: usize,
    pub(crate) tokens: &'a [u32],
    /// Whether the logits after the last of them are wanted.
    pub(crate) last: bool,
}

/// What was fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fed {
    /// Tokens of the prompt.
    pub(crate) of_prompt: usize,
    /// Those of them that somebody else was expected to compute.
    pub(crate) unexpected: usize,
    /// Generated tokens.
    pub(crate) generated: usize,
    /// Tokens that had been fed before their request gave its pages back.
    pub(crate) again: usize,
}

/// A request under way.
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) user: Option<User>,
    pub(crate) adapter: Option<AdapterIndex>,
    /// Whose turn it takes, once the scheduler has it.
    pub(crate) account: Option<AccountId>,
    /// Names those with which it shares its prompt: one of them reads it.
    pub(crate) readers: Option<RequestId>,
    /// Another of them is at it.
    pub(crate) waits: bool,
    /// So many positions were expected of another one when it started, and not charged for.
    expected: usize,
    /// The prompt and what was generated.
    tokens: Vec<u32>,
    prompt: usize,
    /// Empty while it waits.
    lanes: Vec<Lane>,
    /// For each of its sequences, positions that were fed at any time.
    reached: Vec<usize>,
    /// Tokens of the prompt that were there at the start.
    cached: Option<usize>,
    beams: Option<Box<Beams>>,
    /// While it runs, if its next tokens are to be guessed.
    lookup: Option<Lookup>,
    /// Largest length of `tokens`.
    limit: usize,
    end_tokens: Vec<u32>,
    sampler: Sampler,
    decoder: StreamDecoder,
    stops: StopMatcher,
    logprobs: Option<usize>,
    constraint: Option<Box<Constraint>>,
    tokenizer: Tokenizer,
    sink: Sink,
    /// What the event at hand lends to the sink; kept for their memory.
    told: Told,
    /// It has ended; the scheduler removes it.
    pub(crate) over: bool,
}

/// The last token's text before and after stop strings were looked for, and its likelihood.
#[derive(Default)]
struct Told {
    piece: String,
    text: String,
    logprobs: TokenLogprobs,
}

/// What became of a request with its new logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advance {
    Continue,
    /// Its beams have changed: [`Sequence::fork`].
    Fork,
    /// It is over and the sink knows, or broke off.
    Over,
    /// As `Over`, by an error.
    Failed,
}

impl Sequence {
    /// Checks a request.
    pub(crate) fn new(
        id: RequestId,
        request: Request,
        limits: &Limits<'_>,
        tokenizer: &Tokenizer,
        sink: Sink,
    ) -> Result<Self, SubmitError> {
        let Request {
            prompt: mut tokens,
            max_tokens,
            sampling,
            stop,
            mut stop_tokens,
            ignore_end,
            logprobs,
            grammar,
            user,
            adapter,
            beams,
        } = request;
        let prompt = tokens.len();
        if prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if prompt >= limits.context {
            return Err(SubmitError::PromptTooLong {
                prompt,
                context: limits.context,
            });
        }
        if let Some(&id) = tokens.iter().find(|&&id| id >= limits.vocab) {
            return Err(SubmitError::UnknownToken {
                id,
                vocab: limits.vocab,
            });
        }
        let adapter = adapter.map(|digest| limits.adapters.find(digest));
        let adapter = adapter.transpose()?;
        if max_tokens == 0 {
            return Err(SubmitError::NothingToGenerate);
        }
        if stop.len() > MAXIMUM_STOPS
            || stop
                .iter()
                .any(|s| s.is_empty() || s.len() > MAXIMUM_STOP_BYTES)
        {
            return Err(SubmitError::Stops {
                count: MAXIMUM_STOPS,
                bytes: MAXIMUM_STOP_BYTES,
            });
        }
        if let Some(top) = logprobs.filter(|&top| top > MAXIMUM_TOP) {
            return Err(SubmitError::Logprobs {
                asked: top,
                most: MAXIMUM_TOP,
            });
        }
        if let Some(&(id, _)) = sampling.bias.iter().find(|&&(id, _)| id >= limits.vocab) {
            return Err(SubmitError::UnknownToken {
                id,
                vocab: limits.vocab,
            });
        }
        if grammar.as_ref().is_some_and(Grammar::is_whole) && !stop.is_empty() {
            return Err(SubmitError::StopWithGrammar);
        }
        let constraint =
            grammar.map(|grammar| Box::new(Constraint::new(grammar, tokenizer.trie(limits.vocab))));
        let generate = max_tokens.min(limits.context - prompt);
        if beams.is_some()
            && (!sampling.is_plain()
                || !stop.is_empty()
                || logprobs.is_some()
                || constraint.is_some())
        {
            return Err(SubmitError::BeamsWithOthers);
        }
        let sampler = match limits.oblivious {
            true => Sampler::oblivious(sampling, &tokens, generate)?,
            false => Sampler::new(sampling, &tokens, generate)?,
        };
        tokens.reserve_exact(generate);
        if !ignore_end {
            stop_tokens.extend_from_slice(limits.end_tokens);
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let beams = beams.map(|search| check_beams(search, prompt, generate, &stop_tokens, limits));
        let beams = beams.transpose()?;
        let width = beams.as_ref().map_or(1, |beams| beams.width());
        Ok(Self {
            id,
            user,
            adapter,
            account: None,
            readers: None,
            waits: false,
            expected: 0,
            limit: prompt + generate,
            tokens,
            prompt,
            lanes: Vec::with_capacity(width),
            reached: vec![0; width],
            cached: None,
            beams,
            lookup: None,
            end_tokens: stop_tokens,
            sampler,
            decoder: tokenizer.stream(),
            stops: StopMatcher::new(stop),
            logprobs,
            constraint,
            tokenizer: tokenizer.clone(),
            sink,
            told: Told {
                piece: String::with_capacity(USUAL_PIECE),
                text: String::with_capacity(USUAL_PIECE),
                logprobs: TokenLogprobs::default(),
            },
            over: false,
        })
    }

    /// Sequences that it has while it runs.
    pub(crate) fn width(&self) -> usize {
        self.beams.as_ref().map_or(1, |beams| beams.width())
    }

    /// What its first sequence begins with.
    pub(crate) fn text(&self) -> &[u32] {
        &self.tokens
    }

    /// Pages for all that is known of it.
    pub(crate) fn pages_known(&self) -> usize {
        match &self.beams {
            None => self.tokens.len().div_ceil(PAGE),
            Some(beams) => pages_of_beams(self.prompt, beams.length().max(1), beams.width()),
        }
    }

    /// A page for each of its sequences, if what is known of it will not be all.
    pub(crate) fn pages_in_reserve(&self) -> usize {
        // The last token is never fed.
        let most = match &self.beams {
            None => (self.limit - 1).div_ceil(PAGE),
            Some(beams) => pages_of_beams(self.prompt, self.limit - self.prompt, beams.width()),
        };
        match most > self.pages_known() {
            true => self.width(),
            false => 0,
        }
    }

    /// Pages that a running request does not have yet for what is known of it.
    pub(crate) fn pages_to_come(&self, kv: &KvCache) -> usize {
        if self.generating() {
            return 0;
        }
        let end = match &self.beams {
            None => self.tokens.len(),
            Some(beams) => self.prompt + beams.length().max(1),
        };
        let lanes = self.lanes.iter().take(self.active());
        let to_write = lanes.map(|lane| {
            let own = kv.pages_to_write(lane.slot, lane.fed, end);
            match self.waits {
                true => own - (self.shared() / PAGE).saturating_sub(kv.pages_of(lane.slot)),
                false => own,
            }
        });
        // Those that wait for the prompt will share its full pages.
        let waiting = self.width() - self.active();
        to_write.sum::<usize>() + waiting * (end.div_ceil(PAGE) - self.prompt / PAGE)
    }

    /// Pages that would be had if it gave its own back.
    pub(crate) fn pages_to_give(&self, kv: &KvCache) -> usize {
        kv.pages_of_their_own(self.lanes.iter().map(|lane| lane.slot))
    }

    /// Opens its places in the KV cache. For the first time it tells how many tokens of the prompt
    /// are there already.
    pub(crate) fn start(&mut self, kv: &mut KvCache, now: Duration) -> Option<usize> {
        let mut found = 0;
        for lane in 0..self.width() {
            // The beams share what the first one finds, once it has read the prompt.
            let (user, text) = match lane {
                0 => (self.user, &self.tokens[..]),
                _ => (None, &[][..]),
            };
            let Some((slot, fed)) = kv.open(user, self.adapter, text, now) else {
                break;
            };
            found = found.max(fed);
            self.lanes.push(Lane { slot, fed });
        }
        self.reached[0] = self.reached[0].max(found);
        let first = self.cached.is_none();
        self.cached.get_or_insert(found);
        first.then_some(found)
    }

    /// Whether another request with the same prompt can have the pages of this one's.
    pub(crate) fn can_share(&self, other: &Self) -> bool {
        let plain = self.beams.is_none() && other.beams.is_none();
        let alike = self.user == other.user && self.adapter == other.adapter;
        plain && self.shared() > 0 && alike && self.tokens == other.tokens
    }

    /// It may read its prompt with others, which have it in common.
    pub(crate) fn read_with(&mut self, readers: RequestId) {
        self.readers = Some(readers);
    }

    /// Positions of its prompt that those who share it compute once: whole pages, without its last token.
    pub(crate) fn shared(&self) -> usize {
        (self.prompt - 1) / PAGE * PAGE
    }

    /// It has started for the first time, and others may be at what is to be `shared` of its prompt: then
    /// those positions are not charged for, unless it comes to compute them itself. Returns how many it
    /// has to compute in any case.
    pub(crate) fn expect(&mut self, shared: bool) -> usize {
        self.expected = if shared { self.shared() } else { 0 };
        self.prompt - self.cached().max(self.expected)
    }

    /// Takes what another one has read of the prompt that they share.
    pub(crate) fn take_prompt(&mut self, kv: &mut KvCache, from: Slot) {
        let shared = self.shared();
        if let Some(lane) = self.lanes.first_mut() {
            kv.share(lane.slot, from, shared / PAGE);
            lane.fed = shared;
            self.reached[0] = self.reached[0].max(shared);
        }
    }

    /// Lends it what guesses its next tokens: of a request with one sequence, that of its answer.
    pub(crate) fn guess_by(&mut self, lookup: Lookup) {
        self.lookup = Some(lookup);
    }

    /// Takes what guessed its tokens; its text is forgotten.
    pub(crate) fn guess_no_more(&mut self) -> Option<Lookup> {
        let mut lookup = self.lookup.take()?;
        lookup.forget();
        Some(lookup)
    }

    /// Whether its tokens may be guessed.
    pub(crate) fn guesses(&self) -> bool {
        self.lookup.is_some()
    }

    /// Gives its pages back. What was computed of it is known, so that it can go on another time.
    pub(crate) fn give_back(&mut self, kv: &mut KvCache, now: Duration) {
        for lane in self.lanes.drain(..).rev() {
            kv.release(lane.slot, now);
        }
    }

    /// Whether it has run, at least for a while.
    pub(crate) fn started(&self) -> bool {
        self.cached.is_some()
    }

    /// Tokens of the prompt that were computed before it came.
    fn cached(&self) -> usize {
        self.cached.unwrap_or(0)
    }

    /// Sequences that are fed: one while the prompt is read.
    pub(crate) fn active(&self) -> usize {
        match &self.beams {
            Some(beams) if beams.begun() && self.fed(0) >= self.prompt => self.lanes.len(),
            _ => 1,
        }
    }

    /// Whether it reads its prompt again: its beams have begun and gave their pages back.
    fn reads_again(&self) -> bool {
        let begun = self.beams.as_ref().is_some_and(|beams| beams.begun());
        begun && self.fed(0) < self.prompt
    }

    /// Whether the next token of each of its sequences is all that is left to feed.
    pub(crate) fn generating(&self) -> bool {
        !self.reads_again() && (0..self.active()).all(|lane| self.unfed(lane).len() == 1)
    }

    /// What can be fed next, of a request that is not generating.
    pub(crate) fn chunk(&self) -> Chunk<'_> {
        let begun = self.beams.as_ref().is_some_and(|beams| beams.begun());
        if !begun || self.reads_again() {
            return Chunk {
                lane: 0,
                tokens: self.unfed(0),
                last: !begun,
            };
        }
        let longest = (0..self.active()).max_by_key(|&lane| self.unfed(lane).len());
        let lane = longest.unwrap_or(0);
        let unfed = self.unfed(lane);
        Chunk {
            lane,
            // The last tokens of all beams are fed together.
            tokens: &unfed[..unfed.len() - 1],
            last: false,
        }
    }

    /// The place of one of its sequences.
    pub(crate) fn slot(&self, lane: usize) -> Slot {
        self.lanes[lane].slot
    }

    /// Position of the first unfed token of one of its sequences.
    pub(crate) fn fed(&self, lane: usize) -> usize {
        self.lanes.get(lane).map_or(0, |lane| lane.fed)
    }

    /// Tokens of one of its sequences that are known but not yet in the KV cache.
    pub(crate) fn unfed(&self, lane: usize) -> &[u32] {
        let fed = self.fed(lane);
        match &self.beams {
            Some(beams) if beams.begun() && fed >= self.prompt => {
                &beams.tokens(lane)[fed - self.prompt..]
            }
            _ => &self.tokens[fed..],
        }
    }

    /// Writes what to feed next of a request that is generating and has one sequence: its next token,
    /// then at most `most` guesses of those that follow. They take no page, so what a wrong one leaves
    /// lies behind the sequence's end in a page of its own, until that is written over or erased.
    pub(crate) fn draft(&mut self, kv: &KvCache, most: usize, draft: &mut Vec<u32>) {
        draft.clear();
        draft.extend_from_slice(self.unfed(0));
        let Some(lookup) = &mut self.lookup else {
            return;
        };
        lookup.read(&self.tokens);
        let known = self.tokens.len();
        let room = (kv.pages_of(self.lanes[0].slot) * PAGE).saturating_sub(known);
        // One token comes in any case.
        let wanted = self.limit - known - 1;
        lookup.guess(&self.tokens, most.min(room).min(wanted), draft);
    }

    /// Records that the next `count` tokens of one of its sequences are in the KV cache.
    pub(crate) fn feed(&mut self, kv: &mut KvCache, lane: usize, count: usize) -> Fed {
        let Some(of) = self.lanes.get_mut(lane) else {
            return Fed::default();
        };
        let (slot, from, to) = (of.slot, of.fed, of.fed + count);
        of.fed = to;
        let reached = &mut self.reached[lane];
        let new = from.max(*reached);
        let fed = Fed {
            of_prompt: to.min(self.prompt).saturating_sub(new),
            unexpected: to.min(self.expected).saturating_sub(new),
            generated: to.saturating_sub(new.max(self.prompt)),
            again: count.min(reached.saturating_sub(from)),
        };
        *reached = to.max(*reached);
        match &self.beams {
            None => kv.know(slot, to, |position| self.tokens[position]),
            Some(beams) if lane == 0 && from < self.prompt => {
                kv.know(slot, to, |position| self.tokens[position]);
                if beams.begun() && to == self.prompt {
                    // Gave its pages back, and has read its prompt again.
                    self.share(kv, &vec![0; self.width()]);
                }
            }
            Some(_) => {}
        }
        fed
    }

    /// Gives each beam the pages of the one that it continues.
    pub(crate) fn fork(&mut self, kv: &mut KvCache) {
        if let Some(beams) = self.beams.take() {
            self.share(kv, beams.parents());
            self.beams = Some(beams);
        }
    }

    fn share(&mut self, kv: &mut KvCache, parents: &[usize]) {
        kv.fork(self.lanes.iter().map(|lane| lane.slot), parents);
        // All beams are as long as the first.
        let fed = self.fed(0);
        self.lanes.iter_mut().for_each(|lane| lane.fed = fed);
        let reached = self.reached.iter_mut();
        reached.for_each(|reached| *reached = fed.max(*reached));
    }

    /// Tokens of the prompt, and generated ones.
    pub(crate) fn lengths(&self) -> (usize, usize) {
        (self.prompt, self.completion_tokens())
    }

    fn completion_tokens(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Chooses the next token by the logits and tells the sink.
    pub(crate) fn advance(&mut self, logits: &mut [f32], scratch: &mut Scratch) -> Advance {
        if self.beams.is_some() {
            return self.advance_beams(logits, scratch);
        }
        if self.logprobs.is_some() {
            scratch.row.keep(logits);
        }
        let Ok(allowed) = self
            .constraint
            .as_deref_mut()
            .map(Constraint::mask)
            .transpose()
        else {
            return self.fail(RequestError::Vocabulary);
        };
        let Ok(id) = self.sampler.sample(logits, allowed.flatten(), scratch) else {
            return self.fail(RequestError::NonFinite);
        };
        let may_end = self.constraint.as_ref().is_none_or(|c| c.may_end());
        let silent = may_end && self.end_tokens.contains(&id);
        let ended = match &mut self.constraint {
            Some(constraint) if !silent => {
                match constraint.accept(self.tokenizer.token_bytes(id)) {
                    Ok(complete) => complete,
                    Err(_) => {
                        self.tokens.push(id);
                        return self.fail(RequestError::Internal);
                    }
                }
            }
            _ => silent,
        };
        let told = match self.logprobs {
            Some(top) if !silent => {
                scratch.row.logprobs(id, top, &mut self.told.logprobs);
                true
            }
            _ => false,
        };
        self.tell(id, silent, ended, told, scratch)
    }

    /// Takes the logits of all beams. The answer is told when it is found.
    fn advance_beams(&mut self, logits: &[f32], scratch: &mut Scratch) -> Advance {
        let Some(beams) = &mut self.beams else {
            return Advance::Failed;
        };
        match beams.advance(logits) {
            Err(_) => return self.fail(RequestError::NonFinite),
            Ok(false) => return Advance::Fork,
            Ok(true) => {}
        }
        let best = beams.best().map(|best| best.tokens.clone());
        for id in best.unwrap_or_default() {
            let end = self.end_tokens.contains(&id);
            let outcome = self.tell(id, end, end, false, scratch);
            if outcome != Advance::Continue {
                return outcome;
            }
        }
        self.fail(RequestError::Internal)
    }

    /// Adds a token to the answer and tells the sink: without its text if it is `silent`, as the last
    /// one if the answer `ended`.
    fn tell(
        &mut self,
        id: u32,
        silent: bool,
        ended: bool,
        with_logprobs: bool,
        scratch: &mut Scratch,
    ) -> Advance {
        self.tokens.push(id);
        let Told {
            piece,
            text,
            logprobs,
        } = &mut self.told;
        let logprobs = with_logprobs.then_some(Cow::Borrowed(&*logprobs));
        piece.clear();
        text.clear();
        if !silent {
            match &mut scratch.pieces {
                Some(finder) => {
                    let bytes = finder.find(scratch.isa, id);
                    self.decoder.push_bytes_onto(bytes, piece);
                }
                None => self.decoder.push_onto(id, piece),
            }
        }
        let stopped = self.stops.push(piece, text) || ended;
        let full = self.tokens.len() == self.limit;
        if (ended || (full && !stopped)) && !self.stops.push(self.decoder.finish(), text) {
            self.stops.finish(text);
        }
        let text = Cow::Borrowed(text.as_str());
        if (self.sink)(Event::Token { id, text, logprobs }).is_break() {
            return Advance::Over;
        }
        match (stopped, full) {
            (true, _) => self.finish(FinishReason::Stop),
            (false, true) => self.finish(FinishReason::Length),
            (false, false) => return Advance::Continue,
        }
        Advance::Over
    }

    fn fail(&mut self, error: RequestError) -> Advance {
        self.finish(FinishReason::Error(error));
        Advance::Failed
    }

    /// Tells the sink that it is over.
    pub(crate) fn finish(&mut self, reason: FinishReason) {
        let finished = Event::Finished {
            reason,
            prompt_tokens: self.prompt,
            cached_tokens: self.cached(),
            completion_tokens: self.completion_tokens(),
        };
        let _: ControlFlow<()> = (self.sink)(finished);
    }
}

/// A search that the limits have room for.
fn check_beams(
    search: BeamSearch,
    prompt: usize,
    generate: usize,
    end_tokens: &[u32],
    limits: &Limits<'_>,
) -> Result<Box<Beams>, SubmitError> {
    let most = limits.batch.min(MAXIMUM_BEAMS);
    if !(1..=most).contains(&search.width) {
        return Err(SubmitError::Beams {
            asked: search.width,
            most,
        });
    }
    if !(-10.0..=10.0).contains(&search.length_penalty) {
        return Err(SubmitError::LengthPenalty(search.length_penalty));
    }
    let least = beam::least_vocabulary(search.width, end_tokens.len());
    if (limits.vocab as usize) < least {
        return Err(SubmitError::BeamsOfVocabulary {
            least,
            vocab: limits.vocab,
        });
    }
    let pages = pages_of_beams(prompt, generate, search.width);
    if pages > limits.pages {
        return Err(SubmitError::KvMemory {
            beams: search.width,
            needed: pages as u64 * limits.page_bytes,
            given: limits.pages as u64 * limits.page_bytes,
        });
    }
    Ok(Box::new(Beams::new(search, end_tokens.to_vec(), generate)))
}

/// Pages of `width` beams with `generated` tokens each, which share the full pages of the prompt.
fn pages_of_beams(prompt: usize, generated: usize, width: usize) -> usize {
    let shared = prompt / PAGE;
    shared + width * ((prompt + generated).div_ceil(PAGE) - shared)
}
