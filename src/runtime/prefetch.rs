//! Work that is done ahead of its turn, on other threads.
//!
//! In: items in the order in which they will be wanted, and a function. Out: the function's results, in that
//! order. Decoding, resizing and tokenizing the next samples goes on while the model runs this one.
//!
//! Promises: results do not depend on the threads; at most [`THREADS`] · 2 results wait, so memory stays
//! bounded however long the order is; an item that is wanted out of order is done there and then.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

/// The most threads that work ahead. A processor needs some 20 ms for an image of a megapixel, a GPU about as
/// much for the forward: four keep ahead of one GPU.
const THREADS: usize = 4;

/// Results that were made ahead, or are made now.
pub(super) struct Prefetch<'a, I, R> {
    order: &'a [&'a I],
    work: &'a dyn Fn(&I) -> R,
    /// Item `i` comes out of channel `i` modulo their number.
    channels: Vec<Receiver<R>>,
    next: usize,
}

impl<I, R> Prefetch<'_, I, R> {
    /// The result for `item`.
    pub(super) fn take(&mut self, item: &I) -> R {
        let expected = self.order.get(self.next);
        if !expected.is_some_and(|&expected| std::ptr::eq(expected, item)) {
            return (self.work)(item);
        }
        let channel = self.channels.get(self.next % self.channels.len().max(1));
        self.next += 1;
        // A thread that is gone has panicked; the same work will do so here.
        let ahead = channel.and_then(|channel| channel.recv().ok());
        ahead.unwrap_or_else(|| (self.work)(item))
    }
}

/// Calls `f` while threads do `work` for the items of `order`.
pub(super) fn run<I: Sync, R: Send, T>(
    order: &[&I],
    work: impl Fn(&I) -> R + Sync,
    f: impl FnOnce(Prefetch<'_, I, R>) -> T,
) -> T {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(THREADS).min(order.len());
    thread::scope(|scope| {
        let channels = (0..threads).map(|first| {
            let (sender, receiver) = sync_channel(1);
            let work = &work;
            scope.spawn(move || {
                for item in order.iter().skip(first).step_by(threads) {
                    // Nobody listens any more: the job is over, or has failed.
                    if sender.send(work(item)).is_err() {
                        break;
                    }
                }
            });
            receiver
        });
        f(Prefetch {
            order,
            work: &work,
            channels: channels.collect(),
            next: 0,
        })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn results_come_in_order_and_an_item_out_of_order_is_done_at_once() {
        let items: Vec<usize> = (0..50).collect();
        let order: Vec<&usize> = items.iter().collect();
        let stranger = 1000;
        let results = run(
            &order,
            |item| item * 2,
            |mut made| {
                let mut results = Vec::new();
                for item in &items {
                    results.push(made.take(item));
                    results.push(made.take(&stranger));
                }
                results.push(made.take(&items[3]));
                results
            },
        );
        let expected = items.iter().flat_map(|item| [item * 2, 2000]);
        assert_eq!(results, expected.chain([6]).collect::<Vec<_>>());
    }

    #[test]
    fn no_more_is_done_ahead_than_is_promised_and_a_job_may_stop() {
        let items: Vec<usize> = (0..1000).collect();
        let order: Vec<&usize> = items.iter().collect();
        let done = AtomicUsize::new(0);
        let first = run(
            &order,
            |&item| {
                done.fetch_add(1, Ordering::Relaxed);
                item
            },
            |mut made| {
                let first = made.take(&items[0]);
                thread::sleep(std::time::Duration::from_millis(50));
                first
            },
        );
        assert_eq!(first, 0);
        // One taken; per thread one in the channel, one in hand, one begun when the channel closed.
        assert!(done.load(Ordering::Relaxed) <= 1 + 3 * THREADS);
    }
}
