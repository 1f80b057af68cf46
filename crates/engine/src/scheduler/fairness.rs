//! Whose request is next: the one of the user who was served least, and of one user's requests the
//! one that came first.
//!
//! Service is counted in tokens, as in Virtual Token Counter (Sheng et al., "Fairness in Serving
//! Large Language Models", OSDI 2024): a token of a prompt counts [`PROMPT`], a generated one
//! [`GENERATED`]. Who begins to wait is lifted to the least served of those who wait, or, where
//! nobody does, to whose request waited last; so nobody saves up for later, also not by having one
//! request running at all times. Who was served more than that stays behind. While nobody is there
//! everything is forgotten.
//!
//! Requests without a user are one user's.

use std::collections::VecDeque;

use crate::request::User;

/// What a computed token of a prompt counts.
pub(super) const PROMPT: u64 = 1;
/// What a generated token counts: it costs more than one of many that are computed together.
pub(super) const GENERATED: u64 = 2;

/// A user, while it has requests here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AccountId(usize);

struct Account<T> {
    user: Option<User>,
    served: u64,
    /// Requests here, waiting or not.
    requests: usize,
    /// Those that wait, in the order in which they came.
    waiting: VecDeque<(u64, T)>,
    /// Not in use.
    closed: bool,
}

/// The requests that wait, and what their users were served.
pub(super) struct Queue<T> {
    accounts: Vec<Account<T>>,
    waiting: usize,
    /// Whose request waited last. Its account stays while it decides where others begin.
    last: Option<usize>,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Self {
            accounts: Vec::new(),
            waiting: 0,
            last: None,
        }
    }

    /// A request of `user` has come. It is here until [`Self::leave`].
    pub(super) fn enter(&mut self, user: Option<User>) -> AccountId {
        let found = self
            .accounts
            .iter()
            .position(|account| !account.closed && account.user == user);
        let at = found.unwrap_or_else(|| self.open(user));
        self.accounts[at].requests += 1;
        AccountId(at)
    }

    fn open(&mut self, user: Option<User>) -> usize {
        let account = Account {
            user,
            served: 0,
            requests: 0,
            waiting: VecDeque::new(),
            closed: false,
        };
        match self.accounts.iter().position(|account| account.closed) {
            Some(at) => {
                self.accounts[at] = account;
                at
            }
            None => {
                self.accounts.push(account);
                self.accounts.len() - 1
            }
        }
    }

    /// A request that entered is over.
    pub(super) fn leave(&mut self, id: AccountId) {
        self.accounts[id.0].requests -= 1;
        let floor = self.floor();
        let nobody = self.accounts.iter().all(|account| account.requests == 0);
        if nobody {
            self.last = None;
        }
        for (at, account) in self.accounts.iter_mut().enumerate() {
            // At or below the floor it would be lifted to it in any case.
            let past = account.served <= floor && self.last != Some(at);
            account.closed |= account.requests == 0 && (nobody || past);
        }
        while self.accounts.last().is_some_and(|account| account.closed) {
            self.accounts.pop();
        }
    }

    /// What the least served of those who wait was served, or, if nobody does, whose request waited
    /// last. It never falls while anybody is here.
    fn floor(&self) -> u64 {
        let waits = |account: &&Account<T>| !account.waiting.is_empty();
        let waiting = self.accounts.iter().filter(waits);
        let last = || self.last.map(|at| self.accounts[at].served);
        let least = waiting.map(|account| account.served).min();
        least.or_else(last).unwrap_or(0)
    }

    /// Lets a request wait: behind those of its user that came before it. If it is the first of them,
    /// what its user was not served until now is not made up for.
    pub(super) fn put(&mut self, id: AccountId, arrival: u64, request: T) {
        let floor = self.floor();
        let account = &mut self.accounts[id.0];
        if account.waiting.is_empty() {
            account.served = account.served.max(floor);
        }
        let waiting = &mut account.waiting;
        let at = waiting.partition_point(|(before, _)| *before < arrival);
        waiting.insert(at, (arrival, request));
        self.waiting += 1;
    }

    /// Whose turn it is: of those who were served alike, of whom least runs.
    pub(super) fn next(&self) -> Option<AccountId> {
        if self.waiting == 0 {
            return None;
        }
        let accounts = self.accounts.iter().enumerate();
        let first = accounts.filter_map(|(at, account)| {
            let (arrival, _) = account.waiting.front()?;
            let running = account.requests - account.waiting.len();
            Some((account.served, running, *arrival, at))
        });
        first.min().map(|(.., at)| AccountId(at))
    }

    /// The first request of a user that waits.
    pub(super) fn front(&self, id: AccountId) -> Option<&T> {
        self.accounts[id.0]
            .waiting
            .front()
            .map(|(_, request)| request)
    }

    /// Takes it.
    pub(super) fn take(&mut self, id: AccountId) -> Option<T> {
        let (_, request) = self.accounts[id.0].waiting.pop_front()?;
        self.waiting -= 1;
        self.last = Some(id.0);
        Some(request)
    }

    /// Takes the request that came as `arrival`, if it waits.
    pub(super) fn take_arrival(&mut self, arrival: u64) -> Option<T> {
        for (of, account) in self.accounts.iter_mut().enumerate() {
            if let Some(at) = account.waiting.iter().position(|(n, _)| *n == arrival) {
                self.waiting -= 1;
                self.last = Some(of);
                return account.waiting.remove(at).map(|(_, request)| request);
            }
        }
        None
    }

    /// Takes all that wait.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.waiting = 0;
        let accounts = self.accounts.iter_mut();
        accounts.flat_map(|account| account.waiting.drain(..).map(|(_, request)| request))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Counts what was computed for a user.
    pub(super) fn charge(&mut self, id: AccountId, tokens: u64) {
        let served = &mut self.accounts[id.0].served;
        *served = served.saturating_add(tokens);
    }

    /// What was computed for a user.
    pub(super) fn served(&self, id: AccountId) -> u64 {
        self.accounts[id.0].served
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: u8) -> Option<User> {
        Some(User::new([name; 32]))
    }

    /// Serves `tokens` to one request after the other, one at a time, as `next` says.
    fn serve(queue: &mut Queue<(u8, AccountId)>, tokens: u64, requests: usize) -> Vec<u8> {
        let mut order = Vec::new();
        for _ in 0..requests {
            let Some(id) = queue.next() else { break };
            let (name, account) = queue.take(id).unwrap();
            assert_eq!(account, id);
            queue.charge(id, tokens);
            queue.leave(id);
            order.push(name);
        }
        order
    }

    fn ask(queue: &mut Queue<(u8, AccountId)>, name: u8, arrival: u64) {
        let id = queue.enter(user(name));
        queue.put(id, arrival, (name, id));
    }

    #[test]
    fn a_hundred_requests_of_one_user_do_not_hold_up_one_of_another() {
        let mut queue = Queue::new();
        (0..100).for_each(|n| ask(&mut queue, 1, n));
        assert_eq!(serve(&mut queue, 50, 3), [1, 1, 1]);
        ask(&mut queue, 2, 100);
        // It came last and is as little served as whoever is least.
        let order = serve(&mut queue, 50, 3);
        assert!(order.contains(&2), "{order:?}");
        assert_eq!(serve(&mut queue, 50, 200).len(), 97 + 1 - 3);
        assert!(queue.is_empty() && queue.accounts.is_empty());
    }

    #[test]
    fn users_are_served_alike_however_much_they_ask() {
        let mut queue = Queue::new();
        for n in 0..60 {
            ask(&mut queue, 1, 2 * n);
            if n < 20 {
                ask(&mut queue, 2, 2 * n + 1);
            }
        }
        let order = serve(&mut queue, 10, 40);
        let of = |name| order.iter().filter(|n| **n == name).count();
        assert_eq!((of(1), of(2)), (20, 20));
    }

    #[test]
    fn of_those_served_alike_it_is_the_turn_of_whom_least_runs() {
        let mut queue = Queue::new();
        (0..4).for_each(|n| ask(&mut queue, 1, n));
        (4..8).for_each(|n| ask(&mut queue, 2, n));
        let order: Vec<u8> = (0..8)
            .map(|_| {
                let id = queue.next().unwrap();
                queue.take(id).unwrap().0
            })
            .collect();
        assert_eq!(order, [1, 2, 1, 2, 1, 2, 1, 2]);
    }

    #[test]
    fn tokens_count_and_not_requests() {
        let mut queue = Queue::new();
        for n in 0..50 {
            ask(&mut queue, 1, 2 * n);
            ask(&mut queue, 2, 2 * n + 1);
        }
        let mut served = [0u64; 2];
        for _ in 0..44 {
            let id = queue.next().unwrap();
            let (name, _) = queue.take(id).unwrap();
            // The first user's requests are ten times as long.
            let tokens = if name == 1 { 100 } else { 10 };
            queue.charge(id, tokens);
            served[usize::from(name) - 1] += tokens;
        }
        assert!(served[0].abs_diff(served[1]) <= 100, "{served:?}");
    }

    #[test]
    fn pauses_save_nothing_up_and_debts_stay() {
        let mut queue = Queue::new();
        let mut arrivals = 0;
        let mut begin = |queue: &mut Queue<()>, name| {
            arrivals += 1;
            let id = queue.enter(user(name));
            queue.put(id, arrivals, ());
            id
        };
        let (a, b) = (begin(&mut queue, 1), begin(&mut queue, 2));
        queue.charge(a, 1000);
        queue.charge(b, 400);
        // A newcomer begins with the least served who waits, not at zero.
        let c = begin(&mut queue, 3);
        assert_eq!(queue.served(c), 400);
        queue.take(a).unwrap();
        queue.leave(a);
        let back = begin(&mut queue, 1);
        assert_eq!(queue.served(back), 1000, "asking anew wipes nothing out");
        queue.take(c).unwrap();
        queue.leave(c);
        queue.charge(b, 5000);
        let back = begin(&mut queue, 3);
        assert_eq!(queue.served(back), 1000, "lifted to the least served");
        // Nobody waits any more, and one of them runs on: it is where the next one begins.
        for id in [back, a, b] {
            queue.take(id).unwrap();
        }
        queue.leave(a);
        queue.leave(back);
        queue.charge(b, 1);
        let newcomer = begin(&mut queue, 4);
        assert_eq!(queue.served(newcomer), 5401);
    }

    #[test]
    fn who_always_has_one_request_running_saves_nothing_up() {
        let mut queue = Queue::new();
        let mut arrivals = 0;
        let mut ask = |queue: &mut Queue<_>, name| {
            arrivals += 1;
            ask(queue, name, arrivals);
        };
        let take = |queue: &mut Queue<(u8, AccountId)>| {
            let id = queue.next().unwrap();
            queue.take(id).unwrap()
        };
        // An hour: the first user's next short request runs before the one before it ends; the second
        // one's wait all the time.
        ask(&mut queue, 1);
        let (_, mut running) = take(&mut queue);
        (0..8).for_each(|_| ask(&mut queue, 2));
        for _ in 0..1000 {
            ask(&mut queue, 1);
            let mut of_first = None;
            while of_first.is_none() {
                let (name, id) = take(&mut queue);
                if name == 1 {
                    queue.charge(id, 1);
                    of_first = Some(id);
                } else {
                    queue.charge(id, 1000);
                    queue.leave(id);
                    ask(&mut queue, 2);
                }
            }
            queue.leave(running);
            running = of_first.unwrap();
            // What else was computed for the second one meanwhile.
            let of_second = queue.enter(user(2));
            queue.charge(of_second, 7000);
            queue.leave(of_second);
        }
        // Now it asks for much. Nobody is starved.
        (0..40).for_each(|_| ask(&mut queue, 1));
        let mut order = Vec::new();
        for _ in 0..40 {
            let (name, id) = take(&mut queue);
            queue.charge(id, 1000);
            order.push(name);
        }
        let of_second = order.iter().take(20).filter(|name| **name == 2).count();
        assert!((6..=10).contains(&of_second), "{order:?}");
    }

    #[test]
    fn one_users_requests_keep_their_order_also_when_one_comes_back() {
        let mut queue = Queue::new();
        let id = queue.enter(user(1));
        for arrival in [3, 5, 7] {
            queue.put(id, arrival, arrival);
        }
        assert_eq!(queue.take(id), Some(3));
        assert_eq!(queue.take(id), Some(5));
        queue.put(id, 5, 5);
        queue.put(id, 3, 3);
        assert_eq!(queue.take_arrival(7), Some(7));
        assert_eq!(queue.take_arrival(7), None);
        assert_eq!(queue.front(id), Some(&3));
        assert_eq!(queue.drain().collect::<Vec<_>>(), [3, 5]);
        assert!(queue.is_empty());
    }
}
