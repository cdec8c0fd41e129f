//! The same work on several things at a time.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What `work` makes of each item, in the items' order; up to `threads` at a time.
///
/// # Errors
/// The first error of a thread; no item is begun after it.
pub fn map<T: Sync, R: Send, E: Send>(
    threads: usize,
    items: &[T],
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let some = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return Ok(done) };
            done.push((at, work(item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?));
        }
    };
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(items.len())).map(|_| scope.spawn(some)).collect();
        let ended = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|it| std::panic::resume_unwind(it)));
        ended.collect::<Result<Vec<_>, E>>()
    })?;
    let mut done: Vec<(usize, R)> = done.into_iter().flatten().collect();
    done.sort_by_key(|(at, _)| *at);
    Ok(done.into_iter().map(|(_, made)| made).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn several_at_a_time_and_results_in_order() {
        let meet = Barrier::new(4);
        let work = |number: &u32| {
            meet.wait();
            Ok::<_, ()>(number * 2)
        };
        let items: Vec<u32> = (0..8).collect();
        assert_eq!(map(4, &items, work).unwrap(), [0, 2, 4, 6, 8, 10, 12, 14]);
        assert_eq!(map(4, &[], work).unwrap(), [0; 0]);
    }

    #[test]
    fn nothing_is_begun_after_an_error() {
        let begun = AtomicUsize::new(0);
        let result = map(1, &[1, 2, 3], |number| {
            begun.fetch_add(1, Ordering::Relaxed);
            if *number == 2 { Err("two") } else { Ok(()) }
        });
        assert_eq!((result, begun.into_inner()), (Err("two"), 2));
    }
}
