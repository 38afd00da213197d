// SPDX-License-Identifier: Apache-2.0

import java.io.IOException;
import java.io.PrintWriter;
import java.io.RandomAccessFile;
import java.io.StringWriter;
import java.lang.management.ManagementFactory;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.List;
import java.util.TreeMap;
import java.util.concurrent.locks.ReentrantReadWriteLock;
import javax.management.ObjectName;

/**
 * A program that asks who owns files, in several threads, and meanwhile computes something.
 *
 * <p>Usage: java Owners LOG STATUS THREADS FILE…
 *
 * <p>Each FILE is named like its owner. Every thread asks for the owner of each, again and again;
 * one more thread computes a checksum; one reads a file that is open all the time. SIGTERM ends it
 * with STATUS. All is told in LOG, which is opened for every line anew, so that no open file stands
 * in it:
 *
 * <pre>
 * compiled LEVEL METHOD            the checksum's method, by the compiler of that level
 * ready
 * round N thread T us LONGEST WHOLE   a round of lookups: the longest, and in turn each
 * wrong thread T FILE OWNER
 * exception …                      of any thread
 * checkpoint                       one is being made
 * restored VALUE, refused VALUE    what came with the engine's signal
 * checksum STEPS VALUE, heap COUNT SUM, read BYTES, end   after SIGTERM
 * </pre>
 *
 * <p>Properties: owners.compiled=true waits for the compiler, and says "compiled"; owners.open=FILE
 * has one more file open; owners.busy=true does not wait before a checkpoint until no thread looks
 * anything up.
 */
public final class Owners {
    private static Path log;
    private static final ReentrantReadWriteLock PAUSE = new ReentrantReadWriteLock(true);

    private static synchronized void say(String line) {
        try {
            Files.writeString(log, line + "\n", StandardOpenOption.CREATE, StandardOpenOption.APPEND);
        } catch (IOException e) {
            e.printStackTrace();
            Runtime.getRuntime().halt(99);
        }
    }

    private static void exception(Throwable e) {
        StringWriter text = new StringWriter();
        e.printStackTrace(new PrintWriter(text));
        say("exception " + text.toString().replace('\n', ' '));
    }

    /** What a thread does over and over, but not while a checkpoint is made. */
    private interface Work {
        void once() throws Exception;
    }

    private static void work(String name, int pauseMillis, Work work) {
        Thread t =
                new Thread(
                        () -> {
                            try {
                                for (; ; ) {
                                    PAUSE.readLock().lock();
                                    try {
                                        work.once();
                                    } finally {
                                        PAUSE.readLock().unlock();
                                    }
                                    Thread.sleep(pauseMillis);
                                }
                            } catch (Throwable e) {
                                exception(e);
                            }
                        },
                        name);
        t.setDaemon(true);
        t.start();
    }

    // The checksum: FNV-1a over the bytes of a counter.
    private static final long PER_TURN = 20_000;
    private static long steps;
    private static long checksum = 0xcbf29ce484222325L;

    static long step(long sum, long i) {
        return (sum ^ (i & 0xff)) * 0x100000001b3L;
    }

    static long turn(long sum, long from, long to) {
        for (long i = from; i < to; i++) {
            sum = step(sum, i);
        }
        return sum;
    }

    private static final Object COMPUTED = new Object();

    private static void compute() {
        synchronized (COMPUTED) {
            checksum = turn(checksum, steps, steps + PER_TURN);
            steps += PER_TURN;
        }
    }

    /** The line of the compiled method in the virtual machine's list of code, or null. */
    private static String compiled() throws Exception {
        Object list =
                ManagementFactory.getPlatformMBeanServer()
                        .invoke(
                                new ObjectName("com.sun.management:type=DiagnosticCommand"),
                                "compilerCodelist",
                                null,
                                null);
        for (String line : list.toString().split("\n")) {
            // 123 4 0 Owners.turn(JJJ)J [0x…
            String[] words = line.trim().split(" +");
            if (words.length > 3 && words[1].equals("4") && words[3].startsWith("Owners.turn(")) {
                return words[1] + " " + words[3];
            }
        }
        return null;
    }

    private static TreeMap<Integer, List<Integer>> heap() {
        TreeMap<Integer, List<Integer>> tree = new TreeMap<>();
        for (int i = 0; i < 20_000; i++) {
            tree.computeIfAbsent((int) (i * 2654435761L % 997), k -> new ArrayList<>()).add(i);
        }
        return tree;
    }

    private static long read;
    private static RandomAccessFile open;

    /** Reads on in a file that stays open, and from its start in one that is opened anew. */
    private static void readFiles(Path file) throws IOException {
        byte[] old = new byte[16];
        long at = open.getFilePointer();
        int n = open.read(old);
        if (n < 0) {
            open.seek(0);
            return;
        }
        byte[] all = Files.readAllBytes(file);
        for (int i = 0; i < n; i++) {
            if (old[i] != all[(int) at + i]) {
                throw new IOException("at " + (at + i) + " the open file has another byte");
            }
        }
        read += n;
    }

    public static void main(String[] args) throws Exception {
        log = Path.of(args[0]);
        int status = Integer.parseInt(args[1]);
        int threads = Integer.parseInt(args[2]);
        List<Path> files = new ArrayList<>();
        for (int i = 3; i < args.length; i++) {
            files.add(Path.of(args[i]));
        }
        Thread.setDefaultUncaughtExceptionHandler((t, e) -> exception(e));

        TreeMap<Integer, List<Integer>> tree = heap();
        open = new RandomAccessFile(files.get(0).toFile(), "r");
        work("checksum", 1, Owners::compute);
        work("files", 10, () -> readFiles(files.get(0)));
        if (Boolean.getBoolean("owners.compiled")) {
            String line;
            while ((line = compiled()) == null) {
                Thread.sleep(20);
            }
            say("compiled " + line);
        }
        String more = System.getProperty("owners.open");
        RandomAccessFile also = more == null ? null : new RandomAccessFile(more, "r");

        sun.misc.Signal.handle(
                new sun.misc.Signal("TERM"),
                signal -> {
                    synchronized (COMPUTED) {
                        say("checksum " + steps + " " + Long.toUnsignedString(checksum));
                    }
                    long sum = 0;
                    int count = 0;
                    for (var e : tree.entrySet()) {
                        for (int i : e.getValue()) {
                            sum += (long) e.getKey() * i;
                            count++;
                        }
                    }
                    say("heap " + count + " " + sum);
                    say("read " + read + (also == null ? "" : " " + also));
                    say("end");
                    System.exit(status);
                });
        Checkpoint.onRequest(
                new Checkpoint.Resource() {
                    @Override
                    public void beforeCheckpoint() {
                        if (!Boolean.getBoolean("owners.busy")) {
                            PAUSE.writeLock().lock();
                        }
                        say("checkpoint");
                    }

                    @Override
                    public void afterRestore(int value) {
                        say((value < 0 ? "refused " : "restored ") + value);
                        if (PAUSE.isWriteLockedByCurrentThread()) {
                            PAUSE.writeLock().unlock();
                        }
                    }
                });

        for (int t = 0; t < threads; t++) {
            int thread = t;
            int[] round = {0};
            work(
                    "lookup-" + t,
                    20,
                    () -> {
                        StringBuilder each = new StringBuilder();
                        long longest = 0;
                        for (Path file : files) {
                            long start = System.nanoTime();
                            String owner = Files.getOwner(file).getName();
                            long us = (System.nanoTime() - start) / 1000;
                            longest = Math.max(longest, us);
                            each.append(' ').append(us);
                            if (!owner.equals(file.getFileName().toString())) {
                                say("wrong thread " + thread + " " + file + " " + owner);
                            }
                        }
                        say("round " + round[0]++ + " thread " + thread + " us " + longest + each);
                    });
        }
        say("ready");
        Checkpoint.park();
    }
}
