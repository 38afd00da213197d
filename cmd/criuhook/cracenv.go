// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"criuhook/criuhook/crac"
)

type cracOptions struct {
	jdk, criuhook, dropIn               string
	restore, shell, javaOptions, docker bool
}

func newCRaCEnv() *cobra.Command {
	var o cracOptions
	cmd := &cobra.Command{
		Use:   "crac-env [--jdk JAVA_HOME] [--criuhook PATH|--drop-in PATH] [--restore] [--shell|--java-options|--dockerfile]",
		Short: "Print what to set for a JDK with CRaC",
		Long: `Print what has to be set so that checkpoints and restores of a JDK with CRaC go
through criuhook: environment variables and options of java, as this JDK knows
them, each with what it is for. Nothing is changed and nothing is started.

If criuhook is bundled with the JDK (scripts/bundle-jdk), only options of java for
the checkpoint are left. Else criuhook is CRIU's action script, or stands in the
place of CRIU with --drop-in.

A JVM that is started to restore refuses options that only a checkpoint takes: what
it needs is printed with --restore.

  --shell         commands for a shell; what the variables have already stays
  --java-options  options of java, one line: for JDK_JAVA_OPTIONS, which only the
                  launcher java reads, or for a command line. JAVA_TOOL_OPTIONS works
                  too, but every program of the JDK reads it, jcmd for one. A
                  variable that is needed besides is named on stderr
  --dockerfile    ENV instructions`,
		Example: `  criuhook crac-env
  eval "$(criuhook crac-env --shell)"; java -XX:CRaCCheckpointTo=cr -jar app.jar
  eval "$(criuhook crac-env --restore --shell)"; java -XX:CRaCRestoreFrom=cr
  java $(criuhook crac-env --java-options) -XX:CRaCCheckpointTo=cr -jar app.jar
  criuhook crac-env --jdk /opt/zulu --dockerfile >>Dockerfile`,
		Args:                  noArgs,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.jdk, "jdk", "", "home of the JDK, `JAVA_HOME` (default: the variable JAVA_HOME, else that of the first java in PATH)")
	f.StringVar(&o.criuhook, "criuhook", "", "`PATH` of criuhook as CRIU finds it, as its action script (default: this program's)")
	f.StringVar(&o.dropIn, "drop-in", "", "stand in the place of CRIU by this `PATH` to criuhook, which must be named criu")
	f.BoolVar(&o.restore, "restore", false, "what a restore needs (default: what a checkpoint needs)")
	f.BoolVar(&o.shell, "shell", false, "print commands for a shell, to be used as eval \"$(criuhook crac-env --shell)\"")
	f.BoolVar(&o.javaOptions, "java-options", false, "print options of java, one line")
	f.BoolVar(&o.docker, "dockerfile", false, "print ENV instructions for a Dockerfile")
	_ = cmd.MarkFlagDirname("jdk") // it fails only if there is no such option
	return cmd
}

func (o *cracOptions) run(cmd *cobra.Command) error {
	switch {
	case o.shell && o.javaOptions, o.shell && o.docker, o.javaOptions && o.docker:
		return usagef("crac-env prints one form: --shell, --java-options or --dockerfile")
	case o.criuhook != "" && o.dropIn != "":
		return usagef("crac-env: --criuhook names an action script, --drop-in what stands in the place of CRIU; give one")
	}
	home, err := o.home()
	if err != nil {
		return err
	}
	jdk, err := crac.Inspect(home)
	if err != nil {
		return err
	}
	way := crac.Way{Script: o.criuhook, DropIn: o.dropIn}
	if way.Script == "" && way.DropIn == "" && !jdk.Bundled {
		if way.Script, err = os.Executable(); err != nil {
			return fmt.Errorf("find our own executable, to name it as action script: %w; name it with --criuhook", err)
		}
	}
	if !o.docker { // else they are paths of an image, not of this machine
		if err := checkWay(way); err != nil {
			return err
		}
	}
	if path := os.Getenv("CRAC_CRIU_PATH"); jdk.Bundled && !o.docker && path != "" && path != jdk.CRIU {
		fmt.Fprintf(cmd.ErrOrStderr(), "criuhook: Warning: CRAC_CRIU_PATH=%s is set, and the JVM starts that instead of the bundled criuhook: unset it\n", quoted(path))
	}
	phase := crac.Checkpoint
	if o.restore {
		phase = crac.Restore
	}
	out := cmd.OutOrStdout()
	if o.shell {
		vars, err := jdk.Environment(phase, way, os.Getenv)
		if err != nil {
			return err
		}
		return printShell(out, vars)
	}
	list, err := jdk.Settings(phase, way)
	if err != nil {
		return err
	}
	switch {
	case o.javaOptions:
		for _, s := range list {
			if s.Variable != "" {
				fmt.Fprintf(cmd.ErrOrStderr(), "criuhook: to be set in the environment besides: %s (%s)\n", s, s.Comment)
			}
		}
		_, err = fmt.Fprintln(out, crac.Options(list))
		return err
	case o.docker:
		return printDockerfile(out, list, phase)
	}
	return printSettings(out, jdk, way, phase, list)
}

// checkWay tells whether criuhook can be started by the path that was named. What
// is wrong with the name comes first: to make a file of that name would not help.
func checkWay(way crac.Way) error {
	path, check := way.Script, crac.CheckPath
	if way.DropIn != "" {
		path, check = way.DropIn, crac.CheckDropIn
	}
	if path == "" { // bundled
		return nil
	}
	if !filepath.IsAbs(path) {
		return usagef("%q is not an absolute path", path)
	}
	if err := check(path); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("criuhook for CRIU to call: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("criuhook for CRIU to call: %s is not an executable file", path)
	}
	return nil
}

// home is the JDK that was named, or that a shell would find.
func (o *cracOptions) home() (string, error) {
	if o.jdk != "" {
		return o.jdk, nil
	}
	if home := os.Getenv("JAVA_HOME"); home != "" {
		return home, nil
	}
	java, err := exec.LookPath("java")
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", errors.New("which JDK? JAVA_HOME is not set and no java is in PATH; name its home with --jdk")
	}
	file, err := filepath.EvalSymlinks(java)
	if err != nil {
		return "", fmt.Errorf("find the JDK that %s leads to: %w; name its home with --jdk", java, err)
	}
	if filepath.Base(filepath.Dir(file)) != "bin" {
		return "", fmt.Errorf("%s leads to %s, which is not in the bin of a JDK; name its home with --jdk", java, file)
	}
	return filepath.Dir(filepath.Dir(file)), nil
}

func printSettings(w io.Writer, j *crac.JDK, way crac.Way, p crac.Phase, list []crac.Setting) error {
	var b strings.Builder
	version := strings.TrimSpace(j.Vendor + " " + j.Version)
	if version == "" {
		version = "of an unknown release"
	}
	fmt.Fprintf(&b, "# %s: %s\n# engine: %s\n", quoted(j.Home), version, j.Engine)
	switch {
	case j.Bundled:
		fmt.Fprintf(&b, "# CRIU: criuhook is bundled, %s%s\n", quoted(j.CRIU), setUserID(j))
	case j.CRIU != "":
		fmt.Fprintf(&b, "# CRIU: %s%s\n", quoted(j.CRIU), setUserID(j))
	case j.Engine == crac.LibraryByPath:
		b.WriteString("# CRIU: the first criu in PATH; criuhook by that name, before CRIU, needs none of its options here\n")
	default:
		b.WriteString("# CRIU: none in this JDK\n")
	}
	if way.DropIn != "" && j.SetUID {
		b.WriteString("# For users without rights this drop-in does not do: bundle criuhook, or have it as action script.\n")
	}
	fmt.Fprintf(&b, "# for the %s:\n", p)
	for _, s := range list {
		fmt.Fprintf(&b, "\n# %s\n%s\n", s.Comment, s)
	}
	if len(list) == 0 {
		fmt.Fprintf(&b, "\n# nothing has to be set for a %s\n", p)
	}
	if p == crac.Checkpoint {
		b.WriteString("\n# For the restore: criuhook crac-env --restore\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func setUserID(j *crac.JDK) string {
	switch {
	case !j.SetUID:
		return ""
	case j.Owner == 0:
		return ", which runs as root (set-user-id)"
	}
	return fmt.Sprintf(", which runs as uid %d (set-user-id)", j.Owner)
}

// printShell puts the comments last: without quotes around it, eval makes one line
// of all.
func printShell(w io.Writer, vars []crac.Setting) error {
	var b strings.Builder
	for _, s := range vars {
		if s.Value == "" {
			fmt.Fprintf(&b, "unset %s;\n", s.Variable)
			continue
		}
		fmt.Fprintf(&b, "export %s='%s';\n", s.Variable, strings.ReplaceAll(s.Value, "'", `'\''`))
	}
	for _, s := range vars {
		fmt.Fprintf(&b, "# %s: %s\n", s.Variable, s.Comment)
	}
	if len(vars) == 0 {
		b.WriteString("# nothing has to be set\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// inDockerfile escapes what means something between double quotes in a Dockerfile.
var inDockerfile = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`)

func printDockerfile(w io.Writer, list []crac.Setting, p crac.Phase) error {
	var b strings.Builder
	for _, s := range list {
		if s.Variable != "" {
			fmt.Fprintf(&b, "# %s\nENV %s=\"%s\"\n", s.Comment, s.Variable, inDockerfile.Replace(s.Value))
		}
	}
	if options := crac.Options(list); options != "" {
		for _, s := range list {
			if s.Variable == "" {
				fmt.Fprintf(&b, "# %s\n", s.Comment)
			}
		}
		if p == crac.Checkpoint {
			fmt.Fprintf(&b, "# For checkpoints only: to restore, run with -e %s=\"…\", as crac-env --restore --java-options says\n", crac.VariableJava)
		}
		fmt.Fprintf(&b, "ENV %s=\"%s\"\n", crac.VariableJava, inDockerfile.Replace(options))
	}
	if b.Len() == 0 {
		b.WriteString("# nothing has to be set\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}
