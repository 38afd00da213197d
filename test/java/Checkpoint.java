// SPDX-License-Identifier: Apache-2.0

import java.util.concurrent.CountDownLatch;

/**
 * The Java half of a stand-in for CRaC's virtual machine (see test/cracengine): what
 * jdk.crac.Core.checkpointRestore() does, as far as CRIU can tell, on a stock virtual machine.
 *
 * <p>A checkpoint is asked for by SIGWINCH, which the stand-in's jcmd sends for "JDK.checkpoint".
 */
final class Checkpoint {
    /** A program's part in a checkpoint, as org.crac.Resource has it. */
    interface Resource {
        void beforeCheckpoint() throws Exception;

        /** @param value what came with the engine's signal; negative: there was no checkpoint */
        void afterRestore(int value) throws Exception;
    }

    private static final String HOME = System.getenv("CRACENGINE_HOME");

    static {
        System.load(HOME + "/lib/libcheckpoint.so");
    }

    private Checkpoint() {}

    /**
     * Starts the engine's program, waits for it to end, then for the signal that says that we run
     * again.
     *
     * @param upstream as the engine for an upstream CRIU prepares itself
     * @return the value that came with the signal
     */
    private static native int run(String engine, String directory, boolean upstream);

    /** Makes a checkpoint whenever one is asked for. */
    static void onRequest(Resource resource) {
        sun.misc.Signal.handle(
                new sun.misc.Signal("WINCH"),
                signal -> {
                    try {
                        resource.beforeCheckpoint();
                        int value =
                                run(
                                        System.getenv("CRACENGINE_PROGRAM"),
                                        System.getenv("CRACENGINE_CHECKPOINT_TO"),
                                        System.getenv("CRACENGINE_UPSTREAM") != null);
                        resource.afterRestore(value);
                    } catch (Exception e) {
                        throw new IllegalStateException(e);
                    }
                });
    }

    /** Waits for ever. */
    static void park() throws InterruptedException {
        new CountDownLatch(1).await();
    }
}
