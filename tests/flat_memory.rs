//! However many requests a session takes, memory holds those that are on their way: counted, byte by byte.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use common::{Scratch, greedy_request, small};
use minisgl::{
    FinishReason, GenerateRequest, Llm, Message, RequestError, RequestEvent, SessionEvent, SessionOptions,
};

/// Counts the bytes that live, and the most that did.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    PEAK.fetch_max(LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `realloc`'s contract.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that may come to live beside those before: a few KiB for each of the requests that a session may have.
const GROWTH_MAX: usize = 256 << 10;

/// Makes the request of a number.
type Make = fn(u64) -> GenerateRequest;

/// Runs `count` requests through a session; gives by how much living bytes grew at most, and how many had been submitted
/// when the first end came.
fn growth(llm: &Llm, count: u64, request: Make, reason: FinishReason) -> (usize, u64) {
    static SUBMITTED: AtomicUsize = AtomicUsize::new(0);
    SUBMITTED.store(0, Ordering::Relaxed);
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let (mut submitter, events) = llm.handle().session(SessionOptions::default());
    let submitting = thread::spawn(move || {
        for tag in 0..count {
            submitter.submit(tag, request(tag)).unwrap();
            SUBMITTED.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut ends = 0;
    let mut at_first_end = 0;
    for event in events {
        let SessionEvent::Finished { completion, .. } = event.unwrap() else { continue };
        assert_eq!(completion.finish_reason, reason, "{:?}", completion.error);
        if ends == 0 {
            at_first_end = SUBMITTED.load(Ordering::Relaxed) as u64;
        }
        ends += 1;
    }
    submitting.join().unwrap();
    assert_eq!(ends, count);
    (PEAK.load(Ordering::Relaxed) - before, at_first_end)
}

#[test]
fn a_million_requests_take_the_memory_of_those_on_their_way_be_they_good_or_refused() {
    let scratch = Scratch::with_text();
    // A template that refuses what it is given.
    scratch
        .write("chat_template.jinja", "{{ raise_exception('no conversation with ' ~ messages[0].content) }}");
    let mut llm = small(scratch.path()).prefix_cache(false).build().unwrap();
    llm.generate(&[greedy_request(&[1, 2, 3], 2)]).unwrap();
    let cases: [(&str, u64, Make, FinishReason); 5] = [
        ("an empty prompt", 1_000_000, |_| GenerateRequest::tokens([]), FinishReason::Rejected),
        ("an unknown token", 200_000, |i| greedy_request(&[5000 + i as u32; 9], 4), FinishReason::Rejected),
        (
            "a conversation that the template refuses",
            20_000,
            |i| GenerateRequest::chat([Message::new("user", format!("number {i}"))]),
            FinishReason::Rejected,
        ),
        ("a good prompt", 6_000, |i| greedy_request(&[i as u32 % 1000; 4], 1), FinishReason::Length),
        (
            "a good text",
            2_000,
            |i| GenerateRequest::text(format!("number {}", i % 50)).sampling(common::greedy(2)),
            FinishReason::Length,
        ),
    ];
    for (what, count, request, reason) in cases {
        // What is kept for good: a tokenizer remembers words, so many, and a thread what it works with.
        growth(&llm, 500, request, reason);
        let (growth, at_first_end) = growth(&llm, count, request, reason);
        assert!(growth < GROWTH_MAX, "{what}: {growth} bytes more");
        // Taking the first end gives its place to one more, which may be submitted before it is counted.
        assert!(
            at_first_end <= 8 + 16 + 1,
            "{what}: the first end came when {at_first_end} had been submitted"
        );
    }
    // Of a text that is much too long only the beginning is looked at: 20 MB of it, once, and nothing made of them.
    let (bytes, before) = (20 << 20, LIVE.load(Ordering::Relaxed));
    PEAK.store(before, Ordering::Relaxed);
    let request = GenerateRequest::text("a tale ".repeat(bytes / 7));
    let Some(Ok(RequestEvent::Finished { completion, .. })) = llm.handle().submit(request).unwrap().last()
    else {
        panic!("it ends")
    };
    let error = completion.error.unwrap();
    assert!(matches!(error, RequestError::TextTooLong { limit: 511, .. }), "{error}");
    let growth = PEAK.load(Ordering::Relaxed) - before;
    assert!(growth < bytes + GROWTH_MAX, "{growth} bytes more for a text of {bytes}");
    llm.check();
}
