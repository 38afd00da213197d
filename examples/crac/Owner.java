// SPDX-License-Identifier: Apache-2.0

import java.nio.file.Files;
import java.nio.file.Path;

/** Says who owns a file, every second: with sssd, the JVM then holds a connection to it. */
public final class Owner {
    public static void main(String[] args) throws Exception {
        Path file = Path.of(args[0]);
        for (long i = 1; ; i++) {
            System.out.println(i + " " + file + " belongs to " + Files.getOwner(file));
            Thread.sleep(1000);
        }
    }
}
